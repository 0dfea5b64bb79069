"""What the layers of a decoder keep from call to call: a class for each kind, from tracing to the file's interface.

Attributes of all of them: names, of the file's inputs, with a place for the number of the layer; called, the kind of
layer as configs say it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .graph import BATCH, Port

PAST, TOTAL = "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class KeysAndValues:
    """Of attention.

    Attributes:
        heads, key, value: heads, and features of a head of keys and of values.
    """

    heads: int
    key: int
    value: int
    names: ClassVar[tuple[str, ...]] = ("past_key_values.{}.key", "past_key_values.{}.value")
    called: ClassVar[str] = "full_attention"

    def shapes(self, batch: int, past: int) -> list[tuple[int, ...]]:
        """Of examples to trace with."""
        return [(batch, self.heads, past, width) for width in (self.key, self.value)]

    def dims(self, length: str) -> list[tuple[int | str, ...]]:
        """Of inputs and outputs; length: what the number of tokens is called."""
        return [(BATCH, self.heads, length, width) for width in (self.key, self.value)]

    @property
    def free(self) -> tuple[int, ...]:
        """Axes whose sizes are free."""
        return 0, 2


@dataclass(frozen=True)
class ConvolutionInputs:
    """The last inputs of a causal convolution, zeros in front of a text.

    Attributes:
        channels: of the convolution; width: inputs that are kept.
    """

    channels: int
    width: int
    names: ClassVar[tuple[str, ...]] = ("past_conv.{}",)
    called: ClassVar[str] = "conv"

    def shapes(self, batch: int, past: int) -> list[tuple[int, ...]]:
        return [(batch, self.channels, self.width)]

    def dims(self, length: str) -> list[tuple[int | str, ...]]:
        return [(BATCH, self.channels, self.width)]

    @property
    def free(self) -> tuple[int, ...]:
        return (0,)


@dataclass(frozen=True)
class DeltaStates:
    """The inputs of a causal convolution, and what a gated delta rule has learned of the text.

    Attributes:
        inputs: of the convolution.
        heads, key, value: heads of the rule, and features of a head of keys and of values.
    """

    inputs: ConvolutionInputs
    heads: int
    key: int
    value: int
    names: ClassVar[tuple[str, ...]] = (*ConvolutionInputs.names, "past_recurrent.{}")
    called: ClassVar[str] = "linear_attention"

    @property
    def width(self) -> int:
        return self.inputs.width

    def shapes(self, batch: int, past: int) -> list[tuple[int, ...]]:
        return [*self.inputs.shapes(batch, past), (batch, self.heads, self.key, self.value)]

    def dims(self, length: str) -> list[tuple[int | str, ...]]:
        return [*self.inputs.dims(length), (BATCH, self.heads, self.key, self.value)]

    @property
    def free(self) -> tuple[int, ...]:
        return (0,)


Kept = KeysAndValues | ConvolutionInputs | DeltaStates


def kept_in(found: Sequence[torch.Tensor]) -> Kept:
    """The kind of what `ProbeCache` found of a layer."""
    if found[0].dim() == 3:
        inputs = ConvolutionInputs(*found[0].shape[1:])
        return inputs if len(found) == 1 else DeltaStates(inputs, *found[1].shape[1:])
    key, value = found
    return KeysAndValues(key.shape[1], key.shape[3], value.shape[3])


def layer_settings(layers: Sequence[Kept]) -> dict[str, Any]:
    """What a runtime has to know where not every layer keeps keys and values; under the names of onnxruntime-genai."""
    widths = {layer.width for layer in layers if not isinstance(layer, KeysAndValues)}
    if not widths:
        return {}
    return {"layer_types": [layer.called for layer in layers], "conv_cache_size": max(widths)}


def by_layer(values: Sequence, layers: Sequence[Kept]) -> list[list]:
    """Values of all layers in a row, a list for each layer."""
    waiting = iter(values)
    return [[next(waiting) for _ in layer.names] for layer in layers]


def kept_ports(names: Sequence[Sequence[str]], layers: Sequence[Kept], length: str) -> list[Port]:
    """Inputs by the names of values in the graph, by layer."""
    return [
        Port(public.format(number), value, torch.float32, dims)
        for number, (values, layer) in enumerate(zip(names, layers, strict=True))
        for public, value, dims in zip(layer.names, values, layer.dims(length), strict=True)
    ]
