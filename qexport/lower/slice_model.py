"""A file with 8-bit codes as one with their upper bits: weights and scales of its products change, and nothing else."""

from collections import Counter
from dataclasses import dataclass
from math import ceil

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..errors import InputError, LoweringError
from ..quant.packing import pack_rows, unpack_rows
from ..quant.slicing import slice_codes
from .emitter import VIEW_OF, name_of

_KERNEL = "MatMulNBits"
FROM_BITS = 8
TO_BITS = (4, 2)
_LONGEST_BLOCK_2_BITS, _SHORTEST_BLOCK_2_BITS = 128, 32


@dataclass(frozen=True)
class Sliced:
    """What a product was and is.

    Attributes:
        node: its name.
        before, after: bytes of its codes, scales and zero points.
    """

    node: str
    before: int
    after: int


def slice_model(model: ir.Model, bits: int) -> list[Sliced]:
    """Take the upper bits of the codes of every product that has 8, in place.

    A table that an embedding reads too stays as it is.

    Args:
        model: read from a file that qexport wrote.
        bits: 4 or 2.

    Raises:
        InputError: there is no such product, or prompts have products of their own.
        LoweringError: the kernel for so few bits has no such blocks.
    """
    if any(node.op_type == "If" for node in model.graph):
        raise InputError("has other products for prompts, whose codes would stay as they are", place="the file",
                         remedy="Slice an export without them")  # fmt: skip
    shared = _note_views(model)
    readers = Counter(value for node in model.graph for value in node.inputs if value is not None)
    found = []
    for node in model.graph:
        if node.op_type == _KERNEL and node.attributes["bits"].as_int() == FROM_BITS:
            weight = node.inputs[1]
            if weight is None or weight in shared or readers[weight] > 1 or weight.const_value is None:
                continue
            found.append(_slice(node, bits))
    if not found:
        raise InputError(f"has no products with {FROM_BITS}-bit codes in groups", place="the file",
                         remedy="Export with w8a16_g32 or the like")  # fmt: skip
    return found


def _slice(node: ir.Node, bits: int) -> Sliced:
    size = node.attributes["block_size"].as_int()
    if bits == 2 and not _SHORTEST_BLOCK_2_BITS <= size <= _LONGEST_BLOCK_2_BITS:
        raise LoweringError(
            f"has groups of {size}, and the kernel for 2 bits is fast with {_SHORTEST_BLOCK_2_BITS} to "
            f"{_LONGEST_BLOCK_2_BITS}", place=name_of(node),
        )  # fmt: skip
    codes, scales = _read(node, 1), _read(node, 2)
    n, blocks = codes.shape[0], codes.shape[1]
    packed = _read(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    zero = None if packed is None else unpack_rows(packed.reshape(n, -1), FROM_BITS, blocks)[..., None]
    before = sum(t.numel() * t.element_size() for t in (codes, scales, packed) if t is not None)
    fewer, zeros = slice_codes(codes, zero, FROM_BITS, bits)
    made = [pack_rows(fewer, bits), scales * 2 ** (FROM_BITS - bits)]
    if zeros is not None and packed is not None:
        rows = pack_rows(zeros[..., 0], bits)
        made.append(rows.reshape(n * ceil(blocks * bits / 8)) if packed.dim() == 1 else rows)
    for place, tensor in enumerate(made, 1):
        value = node.inputs[place]
        assert value is not None
        value.const_value = ir.tensor(tensor.contiguous().numpy(), name=value.name)
        value.shape = ir.Shape(tensor.shape)
    node.attributes["bits"] = ir.AttrInt64("bits", bits)
    return Sliced(name_of(node), before, sum(t.numel() * t.element_size() for t in made))


def _read(node: ir.Node, place: int) -> Tensor:
    value = node.inputs[place]
    if value is None or value.const_value is None:
        raise LoweringError("has a weight that is not a tensor of the file", place=name_of(node))
    return torch.from_numpy(np.array(value.const_value.numpy()))


def _note_views(model: ir.Model) -> set[ir.Value]:
    """Initializers that lie in the same bytes of the file, noted for `write_model` to put them there again."""
    first: dict[tuple[int, int], ir.Value] = {}
    found: set[ir.Value] = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.length:
            owner = first.setdefault((tensor.offset or 0, tensor.length), value)
            if owner is not value:
                value.meta[VIEW_OF] = owner.name
                found |= {owner, value}
    return found
