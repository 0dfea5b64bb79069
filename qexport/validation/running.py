"""Running the deployed file on tensors, also with more outputs than it has: they come from a model in memory."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from ..artifact.branches import PROMPTS, only
from ..artifact.manifest import MODEL_FILE, Manifest
from ..errors import InputError, RuntimeProblem
from ..quant.float_types import FLOAT_TYPES
from ..runtime.session import ModelInFolder, open_session
from .reference import Feeds

_DTYPES = {  # of what a session takes, by the names that it has for types
    **{kind.session: dtype for dtype, kind in FLOAT_TYPES.items()},
    **{"tensor(int8)": torch.int8, "tensor(uint8)": torch.uint8},
}


def with_outputs(folder: Path, values: Sequence[str]) -> ModelInFolder:
    """The model of a folder with additional outputs.

    Of a file with branches it has the one for prompts alone: what is inside of a branch cannot be an output.

    Raises:
        InputError: the graph has no such value.
    """
    model = only(onnx.load(folder / MODEL_FILE, load_external_data=False), PROMPTS)
    graph = model.graph
    known = {output for node in graph.node for output in node.output} | {value.name for value in graph.input}
    if missing := [value for value in values if value not in known]:
        raise InputError(
            f"has no value {missing[0]}, which the manifest names",
            place=str(folder / MODEL_FILE),
            remedy="Export the model again",
        )
    present = {output.name for output in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in present)
    return ModelInFolder(folder, model.SerializeToString())


def run_values(
    folder: Path, manifest: Manifest, values: list[str], feeds: Sequence[Feeds],
    threads: int | None, provider: str | None,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """Values of the deployed file by name, a tensor for each batch."""
    session = open_session(with_outputs(folder, values), manifest, threads=threads, provider=provider)
    results: dict[str, list[Tensor]] = {value: [] for value in values}
    for batch in feeds:
        for name, array in run_session(session, batch, values).items():
            results[name].append(array)
    return results


def run_session(session: ort.InferenceSession, feeds: Feeds, names: Sequence[str]) -> dict[str, Tensor]:
    """Run a session on tensors by public name and return the named outputs.

    Raises:
        RuntimeProblem: ONNX Runtime fails.
    """
    binding, held = session.io_binding(), []
    for value in session.get_inputs():
        tensor = feeds[value.name]
        if tensor.numel() == 0 and isinstance(value.shape[-1], int):  # an empty cache, of codes it may be half as wide
            tensor = tensor.reshape(*tensor.shape[:-1], value.shape[-1])
        held.append(_as_value(tensor.to(_DTYPES.get(value.type, tensor.dtype))))  # whose memory a binding does not keep
        binding.bind_ortvalue_input(value.name, held[-1])
    for name in names:
        binding.bind_output(name, "cpu")
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime has one exception class for each status code and no base class
        raise RuntimeProblem(f"the model fails on the validation inputs: {error}") from error
    return {name: _as_tensor(value) for name, value in zip(names, binding.get_outputs(), strict=True)}


def _as_tensor(value: ort.OrtValue) -> Tensor:
    tensor = torch.from_dlpack(value)
    return tensor.bool() if value.data_type() == "tensor(bool)" else tensor  # which comes as bytes


def _as_value(tensor: Tensor) -> ort.OrtValue:
    tensor = tensor.contiguous()
    kind = FLOAT_TYPES.get(tensor.dtype)
    if kind is None or kind.in_numpy:
        return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), kind.onnx)
