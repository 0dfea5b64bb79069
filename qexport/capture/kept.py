"""What the layers of a decoder keep from call to call, from tracing to the file's interface.

A layer may keep keys and values, which grow by a row for every token, the last inputs of a causal convolution, and the
state of a recurrence, both of which are zeros in front of a text: any of these together, or nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .graph import BATCH, Port

PAST, TOTAL = "past_sequence_length", "total_sequence_length"
KEY, VALUE, CONV, RECURRENT = "key", "value", "conv", "recurrent"
# Names of the file's inputs, with a place for the number of the layer, in their order.
_INPUTS = {
    KEY: "past_key_values.{}.key", VALUE: "past_key_values.{}.value",
    CONV: "past_conv.{}", RECURRENT: "past_recurrent.{}",
}  # fmt: skip
# Kinds of layers as configs of transformers say them, by what they keep.
_CALLED = {
    frozenset(): "none", frozenset({KEY, VALUE}): "full_attention", frozenset({CONV}): "conv",
    frozenset({CONV, RECURRENT}): "linear_attention", frozenset({RECURRENT}): "linear_attention",
    frozenset(_INPUTS): "hybrid",
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """One tensor that a layer keeps.

    Attributes:
        role: "key", "value", "conv" or "recurrent".
        dims: sizes behind the batch; None where the number of tokens stands.
    """

    role: str
    dims: tuple[int | None, ...]

    def shape(self, batch: int, past: int) -> tuple[int, ...]:
        """Of an example to trace with."""
        return (batch, *(past if size is None else size for size in self.dims))

    @property
    def free(self) -> tuple[int, ...]:
        """Axes whose sizes are free."""
        return (0, *(axis for axis, size in enumerate(self.dims, 1) if size is None))

    def port(self, number: int, value: str, length: str) -> Port:
        """The file's input for layer `number`.

        Args:
            value: its name in the graph; length: what the number of tokens is called.
        """
        dims = (BATCH, *(length if size is None else size for size in self.dims))
        return Port(_INPUTS[self.role].format(number), value, torch.float32, dims)


Layer = tuple[Kept, ...]


def kept_in(found: Mapping[str, torch.Tensor]) -> Layer:
    """What a layer keeps, by an example of each tensor as `ProbeCache` found it."""

    def dims(role: str) -> tuple[int | None, ...]:
        sizes = found[role].shape[1:]
        return (sizes[0], None, sizes[2]) if role in (KEY, VALUE) else tuple(sizes)

    return tuple(Kept(role, dims(role)) for role in _INPUTS if role in found)


def first_keys(layers: Sequence[Layer]) -> tuple[int, int] | None:
    """Heads, and features of a head of keys, of the first layer that keeps keys; None where none does."""
    dims = (kept.dims for layer in layers for kept in layer if kept.role == KEY)
    return next(((heads, width) for heads, _, width in dims if heads is not None and width is not None), None)


def layer_settings(layers: Sequence[Layer]) -> dict[str, Any]:
    """What a runtime has to know where not every layer keeps keys and values; under the names of onnxruntime-genai."""
    called = [_CALLED[frozenset(kept.role for kept in layer)] for layer in layers]
    if set(called) == {_CALLED[frozenset({KEY, VALUE})]}:
        return {}
    widths = [width for layer in layers for kept in layer if kept.role == CONV and (width := kept.dims[-1])]
    return {"layer_types": called, **({"conv_cache_size": max(widths)} if widths else {})}


def by_layer(values: Sequence, layers: Sequence[Layer]) -> list[list]:
    """Values of all layers in a row, a list for each layer."""
    waiting = iter(values)
    return [[next(waiting) for _ in layer] for layer in layers]


def kept_ports(names: Sequence[Sequence[str]], layers: Sequence[Layer], length: str) -> list[Port]:
    """Inputs by the names of values in the graph, by layer."""
    return [
        kept.port(number, value, length)
        for number, (values, layer) in enumerate(zip(names, layers, strict=True))
        for value, kept in zip(values, layer, strict=True)
    ]
