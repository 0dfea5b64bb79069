"""What the inputs of linears reach, and how much of them a static scale cuts off."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from ..artifact.branches import PROMPTS, only
from ..artifact.manifest import MODEL_FILE
from ..runtime.tensors import tensor_of
from .report import InputRange

_CODES = {onnx.TensorProto.INT8: (-128, 127), onnx.TensorProto.UINT8: (0, 255)}


def static_limits(folder: Path) -> dict[str, tuple[float, float]]:
    """What values reach at most behind their static quantization: (lowest, highest) by the name of the value.

    They are read from the deployed file itself, so that a scale which is wrong there shows.
    """
    graph = only(onnx.load(folder / MODEL_FILE, load_external_data=False), PROMPTS).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    limits: dict[str, tuple[float, float]] = {}

    def number(name: str) -> float | None:
        tensor = constants.get(name)
        if tensor is None or max(tensor.dims, default=1) != 1:
            return None
        return float(tensor_of(tensor, folder).reshape(()))

    divided: dict[str, tuple[str, float]] = {}
    rounded: dict[str, tuple[float, float]] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and (scale := number(node.input[1])) is not None:
            zero = constants.get(node.input[2]) if len(node.input) > 2 else None
            if zero is not None and zero.data_type in _CODES:
                low_code, high_code = _CODES[zero.data_type]
                if (offset := number(zero.name)) is not None:
                    reach = scale * (low_code - offset), scale * (high_code - offset)
                    limits.setdefault(node.input[0], reach)
                    rounded[node.output[0]] = reach[0], reach[1] - scale / 2
        # Of what was rounded to the last code nobody can tell how far it reached.
        elif node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            limits.setdefault(node.output[0], rounded[node.input[0]])
        # Few bits are held within their range by a Clip, in front of a container that is wider.
        elif node.op_type == "Div" and (scale := number(node.input[1])) is not None:
            divided[node.output[0]] = (node.input[0], scale)
        elif node.op_type == "Clip" and len(node.input) == 3 and node.input[0] in divided:
            name, scale = divided[node.input[0]]
            low, high = (number(bound) for bound in node.input[1:3])
            if low is not None and high is not None:
                limits[name] = (scale * low, scale * high)
    return limits


def input_range(
    block: str, linears: Sequence[str], want: Sequence[Tensor], got: Sequence[Tensor],
    limits: tuple[float, float] | None,
) -> InputRange:  # fmt: skip
    """The range of a value that linears read.

    Args:
        want, got: float and deployed, [..., channels] for each batch.
        limits: of its static quantization; None where there is none.
    """
    float_absmax, float_spread = _reached(want)
    absmax, spread = _reached(got)
    clipped = reach = None
    if limits is not None:
        low, high = limits
        outside = sum(int(((value < low) | (value > high)).sum()) for value in got)
        clipped, reach = outside / sum(value.numel() for value in got), max(-low, high)
    return InputRange(
        block=block, linears=tuple(linears), float_absmax=float_absmax, absmax=absmax, float_spread=float_spread,
        spread=spread, clipped=clipped, reach=reach,
    )  # fmt: skip


def _reached(values: Sequence[Tensor]) -> tuple[float, float]:
    """Largest magnitude, and that over the median channel's."""
    channels = torch.stack([value.abs().flatten(0, -2).amax(0).float() for value in values]).amax(0)
    largest, median = float(channels.max()), float(channels.median())
    return largest, largest / median if median else float("inf")
