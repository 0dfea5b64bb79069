"""Keys and values that attention keeps, in 8 or 4 bits with calibrated scales, or as 8-bit floats.

They are rounded as the cache holds them, keys behind their rotation, for the new tokens too: attention reads all of
them from the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.edit import add_tensor, call, finish, is_call
from ...graph.meta import Meta
from ...graph.schema import rebind
from ...graph.views import CachedAttention, size_at
from ...plan.linear_plan import LinearPlan
from ...quant.kv_cache import cache_scale, code_range, read_cache, stored_cache
from ...quant.observers import ChannelAbsmax
from ...quant.small_floats import E4M3_LARGEST
from ...recipe.methods import CacheMethod
from ...recipe.recipe import Recipe
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, SiteRecord

ops = torch.ops.qexport


@method("cache", "kv_cache")
class KVCacheSection(CacheMethod):
    """Keys and values of attention in few bits; takes grouped attention. `w4a16_g32_kv8` is short for it.

    Attributes:
        bits: 8 or 4.
        numbers: "int", or "e4m3" for 8-bit floats (`kvfp8`): CUDA keeps them, the CPU rounds to them and keeps floats.
        scales: "channel" (one for every feature of every head), "tensor" (one for all keys, one for all values), or
            "stored": those two as a checkpoint that is quantized already has them, without calibration.
    """

    bits: Literal[8, 4] = 8
    numbers: Literal["int", "e4m3"] = "int"
    scales: Literal["channel", "tensor", "stored"] = "channel"
    needs_grouped_attention: ClassVar[bool] = True
    takes_shared: ClassVar[bool] = True
    short: ClassVar[str] = r"kv(?P<bits>[48]|fp8)"

    @classmethod
    def from_short(cls, **parts: str) -> Self:
        return cls(numbers="e4m3") if parts["bits"] == "fp8" else cls(bits=int(parts["bits"]))

    def check(self, recipe: Recipe) -> None:
        if self.numbers == "e4m3" and self.bits != 8:
            raise ValueError("e4m3 numbers have 8 bits", "Leave out bits")

    @classmethod
    def candidates(cls) -> Sequence[Self]:
        return cls(bits=8), cls(bits=4)

    @property
    def called_numbers(self) -> str:
        return _numbers(self.bits, self.numbers == "e4m3")

    def bits_kept(self, float_bits: int, e4m3: bool) -> int:
        return float_bits if self.numbers == "e4m3" and not e4m3 else self.bits

    def rounded(self, x: Tensor) -> Tensor:
        absmax, e4m3 = x.abs().amax((0, 2)), self.numbers == "e4m3"
        scale = cache_scale(_of_scales(absmax, self.scales == "channel"), self.bits, e4m3)
        return read_cache(stored_cache(x, scale, self.bits, e4m3), scale, self.bits, e4m3)

    @property
    def needs_calibration(self) -> bool:
        return self.scales != "stored"

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [QuantizeCache(self.bits, self.scales == "channel", self.numbers == "e4m3", self.scales == "stored")]


@dataclass(frozen=True)
class QuantizeCache(GraphPass):
    """Round what goes into the cache of every attention.

    Attributes:
        bits: 8 or 4.
        per_channel: a scale for every feature of every head; else one for all keys and one for all values of a layer.
        e4m3: to E4M3 numbers, not integers.
        stored: with the scales that the checkpoint has.
    """

    bits: int
    per_channel: bool = True
    e4m3: bool = False
    stored: bool = False
    preserves_values: ClassVar[bool] = True

    def applies_to(self, module: GraphModule) -> bool:
        return bool(_attentions(module))

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        found = map(CachedAttention.of, () if self.stored else _attentions(module))
        return {value: ChannelAbsmax for attention in found for value in (attention.key, attention.value)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result, graph = PassResult(), module.graph
        for node in _attentions(module):
            attention = CachedAttention.of(node)
            heads, size = size_at(attention.key, 1), size_at(attention.key, 3)
            for index, (name, value) in enumerate((("key", attention.key), ("value", attention.value))):
                place = f"{node.meta.get(Meta.MODULE_PATH, '') or node.name}.{name}_scale"
                if self.stored:
                    steps = _stored(node, place)[index]
                    largest = E4M3_LARGEST if self.e4m3 else code_range(self.bits)[1]
                    absmax = steps * largest
                else:
                    absmax = _of_scales(context.statistics[value].absmax().view(heads, size), self.per_channel)
                    steps = cache_scale(absmax, self.bits, self.e4m3)
                with graph.inserting_before(node):
                    scale = add_tensor(graph, place, steps)
                    if self.e4m3:
                        rounded = call(graph, ops.round_e4m3.default, (value, scale), like=value)
                    else:
                        rounded = call(graph, ops.round_cache.default, (value, scale, self.bits), like=value)
                rebind(node, **{name: rounded})
                data = {"range": round(float(absmax.max()), 4)}
                result.changed.append(SiteRecord(place.removesuffix("_scale"), _numbers(self.bits, self.e4m3), data))
        finish(module)
        return result


def _numbers(bits: int, e4m3: bool) -> str:
    return "e4m3" if e4m3 else f"int{bits}"


def _of_scales(absmax: Tensor, per_channel: bool) -> Tensor:
    """Of magnitudes [kv_heads, head_dim] the largest for each scale: [kv_heads, 1, head_dim] or [1]."""
    return absmax[:, None] if per_channel else absmax.max().view(1)


def _stored(node: Node, place: str) -> tuple[Tensor, Tensor]:
    """The scales of keys and values, float32 [1] each."""
    found = node.meta.get(Meta.CACHE_SCALES)
    if found is None:
        raise PassError("the checkpoint has no such scale", place=place, remedy="Use scales: tensor, or no kv_cache")
    return torch.tensor(found[:1]), torch.tensor(found[1:])


def _attentions(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if is_call(node, ops.cached_attention.default)]
