"""What the layers of a decoder keep from call to call, from tracing to the file's interface.

A layer may keep keys and values, the key of an indexer and what summaries of tokens are made of, which grow by a row
for every token, the last inputs of causal convolutions, and the states of recurrences, both of which are zeros in front
of a text: any of these together, or nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .graph import BATCH, Port

PAST, TOTAL = "past_sequence_length", "total_sequence_length"
KEY, VALUE, INDEXER, SUMMED, CONV, RECURRENT = "key", "value", "indexer", "summed", "conv", "recurrent"
# Names of the file's inputs, with a place for the number of the layer, in their order.
_INPUTS = {
    KEY: "past_key_values.{}.key", VALUE: "past_key_values.{}.value", INDEXER: "past_indexer.{}",
    SUMMED: "past_summed.{}", CONV: "past_conv.{}", RECURRENT: "past_recurrent.{}",
}  # fmt: skip
_GROWING = (KEY, VALUE, INDEXER, SUMMED)
# Kinds of layers as configs of transformers say them, by what they keep; other states beside keys are "hybrid".
_CALLED = {
    frozenset(): "none", frozenset({KEY, VALUE}): "full_attention", frozenset({CONV}): "conv",
    frozenset({KEY}): "full_attention",
    frozenset({CONV, RECURRENT}): "linear_attention", frozenset({RECURRENT}): "linear_attention",
    frozenset({KEY, VALUE, INDEXER}): "indexed_attention",
    frozenset({KEY, SUMMED}): "heavily_compressed_attention",
    frozenset({KEY, INDEXER, SUMMED}): "compressed_sparse_attention",
}  # fmt: skip


def state(role: str, number: int) -> str:
    """The role of one of several states of a kind, which a layer's code tells apart by number."""
    return f"{role}.{number}" if number else role


def kind_of(role: str) -> str:
    """The role without its number."""
    return role.partition(".")[0]


def _in_order(role: str) -> tuple[int, str]:
    return list(_INPUTS).index(kind_of(role)), role


@dataclass(frozen=True)
class Kept:
    """One tensor that a layer keeps.

    Attributes:
        role: "key", "value", "indexer", "summed", "conv" or "recurrent"; of several states "conv", "conv.1" and so on.
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

    def port(self, number: int, value: str, length: str, numbered: bool) -> Port:
        """The file's input for layer `number`.

        Args:
            value: its name in the graph; length: what the number of tokens is called.
            numbered: the layer has several of its kind: past_conv.3.0, past_conv.3.1.
        """
        dims = (BATCH, *(length if size is None else size for size in self.dims))
        kind, _, place = self.role.partition(".")
        name = _INPUTS[kind].format(number)
        return Port(f"{name}.{place or 0}" if numbered else name, value, torch.float32, dims)


Layer = tuple[Kept, ...]


def kept_in(found: Mapping[str, torch.Tensor]) -> Layer:
    """What a layer keeps, by an example of each tensor as `ProbeCache` found it."""

    def dims(role: str) -> tuple[int | None, ...]:
        sizes = found[role].shape[1:]
        return (sizes[0], None, sizes[2]) if role in _GROWING else tuple(sizes)

    return tuple(Kept(role, dims(role)) for role in sorted(found, key=_in_order))


def first_keys(layers: Sequence[Layer]) -> tuple[int, int] | None:
    """Heads, and features of a head of keys, of the first layer that keeps keys; None where none does."""
    dims = (kept.dims for layer in layers for kept in layer if kept.role == KEY)
    return next(((heads, width) for heads, _, width in dims if heads is not None and width is not None), None)


def layer_settings(layers: Sequence[Layer]) -> dict[str, Any]:
    """What a runtime has to know where not every layer keeps keys and values; under the names of onnxruntime-genai."""
    called = [_CALLED.get(frozenset(kind_of(kept.role) for kept in layer), "hybrid") for layer in layers]
    if set(called) == {_CALLED[frozenset({KEY, VALUE})]}:
        return {}
    widths = [width for layer in layers for kept in layer if kind_of(kept.role) == CONV and (width := kept.dims[-1])]
    summed = any(kept.role == SUMMED for layer in layers for kept in layer)
    return {
        "layer_types": called,
        **({"conv_cache_size": max(widths)} if widths else {}),
        **({"padding_counts": True} if summed else {}),  # in transformers too: windows begin with a row
    }


def by_layer(values: Sequence, layers: Sequence[Layer]) -> list[list]:
    """Values of all layers in a row, a list for each layer."""
    waiting = iter(values)
    return [[next(waiting) for _ in layer] for layer in layers]


def kept_ports(names: Sequence[Sequence[str]], layers: Sequence[Layer], length: str) -> list[Port]:
    """Inputs by the names of values in the graph, by layer."""
    return [
        kept.port(number, value, length, _is_numbered(kept, layer))
        for number, (values, layer) in enumerate(zip(names, layers, strict=True))
        for value, kept in zip(values, layer, strict=True)
    ]


def _is_numbered(kept: Kept, layer: Layer) -> bool:
    return any("." in other.role for other in layer if kind_of(other.role) == kind_of(kept.role))
