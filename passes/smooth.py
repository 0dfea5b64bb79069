"""SmoothQuant (arXiv 2211.10438): move the difficulty of activations into weights, exactly, channel by channel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from ..errors import PassError
from ..numerics.observers import ChannelAbsmax
from ..numerics.smoothing import smoothquant_factors
from .base import Context, GraphPass, Note, PassResult
from .edit import add_tensor, call, get_tensor, set_tensor
from .plan import LinearPlan
from .sites import FoldSite, fold_sites, linear_at, norm_bias, norm_gain

aten = torch.ops.aten


@dataclass(frozen=True)
class SmoothQuant(GraphPass):
    """Divide each channel of a linear's input by s = max|x|^alpha / max|w|^(1-alpha) and multiply the weight by it.

    The division goes into what produces the value (a norm's gain and bias, the rows of a linear in front), so that it
    costs nothing. Values whose consumers are all left with float inputs are not touched.

    Attributes:
        plan: by linear name.
        alpha: 0 leaves activations as they are, 1 makes all their channels equal.
        explicit: where nothing can take the division, insert a multiplication instead of skipping the site.
    """

    plan: Mapping[str, LinearPlan]
    alpha: float = 0.5
    explicit: bool = False
    keeps_function: ClassVar[bool] = True

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {site.value: ChannelAbsmax for site in self._wanted(module)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for site in fold_sites(module.graph):
            names = ", ".join(c.name for c in site.consumers)
            if not self._quantizes(site):
                result.skipped.append(Note(names, "no input of these linears is quantized"))
            elif not self._foldable(site):
                result.skipped.append(Note(names, f"no place for the factor: {site.why}"))
            else:
                factors = self._factors(module, site, context.statistics[site.value].absmax())
                fold(module, site, factors)
                spread = (factors.max() / factors.min()).item()
                result.changed.append(
                    Note(names, f"folded into {_where(site)}", {"largest/smallest factor": round(spread, 2)})
                )
        module.recompile()
        return result

    def _wanted(self, module: GraphModule) -> list[FoldSite]:
        return [site for site in fold_sites(module.graph) if self._quantizes(site) and self._foldable(site)]

    def _foldable(self, site: FoldSite) -> bool:
        return site.kind != "explicit" or (self.explicit and site.scalable)

    def _quantizes(self, site: FoldSite) -> bool:
        plans = [self.plan.get(c.name) for c in site.consumers]
        return any(p is not None and p.scheme is not None and p.scheme.activation is not None for p in plans)

    def _factors(self, module: GraphModule, site: FoldSite, absmax: torch.Tensor) -> torch.Tensor:
        weights = [get_tensor(module, c.weight) for c in site.consumers]
        if site.repeat is None:
            return smoothquant_factors(absmax, weights, self.alpha)
        kv_heads, queries, head_dim = site.repeat
        # One factor for a channel of a kv head: query heads that share it are rows of one larger weight.
        shared = absmax.view(kv_heads, queries, head_dim).amax(dim=1).reshape(-1)
        stacked = [part for w in weights for part in w.view(-1, kv_heads, queries, head_dim).unbind(2)]
        return smoothquant_factors(shared, [w.reshape(-1, kv_heads * head_dim) for w in stacked], self.alpha)


def _where(site: FoldSite) -> str:
    return {"norm": "the norm", "rows": "the rows of the linear in front", "explicit": "a multiplication"}[site.kind]


def fold(module: GraphModule, site: FoldSite, factors: torch.Tensor) -> None:
    """Divide the value of a site by per-channel factors and multiply its consumers' weights, in place.

    Args:
        factors: positive, one for each channel of the producer: in_features of the consumers, or kv_heads * head_dim
            where the site repeats kv heads.

    Raises:
        PassError: the site is not scalable.
    """
    if not site.scalable:
        raise PassError(site.why, place=site.consumers[0].name, remedy="Skip sites that are not scalable")
    columns = factors
    if site.repeat is not None:
        kv_heads, queries, head_dim = site.repeat
        columns = factors.view(kv_heads, 1, head_dim).expand(kv_heads, queries, head_dim).reshape(-1)
    for weight in {c.weight for c in site.consumers}:
        set_tensor(module, weight, get_tensor(module, weight) * columns)
    if site.kind == "norm":
        _divide_norm(module, site.producer, factors)
    elif site.kind == "rows":
        linear = linear_at(site.producer)
        set_tensor(module, linear.weight, get_tensor(module, linear.weight) / factors[:, None])
        if linear.bias is not None:
            set_tensor(module, linear.bias, get_tensor(module, linear.bias) / factors)
    else:
        graph = module.graph
        with graph.inserting_after(site.value):
            inverse = add_tensor(graph, f"{site.consumers[0].name}.input_factor", 1.0 / factors)
        with graph.inserting_after(inverse):
            scaled = call(graph, aten.mul.Tensor, (site.value, inverse), like=site.value)
        for consumer in site.consumers:
            consumer.node.replace_input_with(site.value, scaled)


def _divide_norm(module: GraphModule, norm: Node, factors: torch.Tensor) -> None:
    name, offset = norm_gain(norm)
    set_tensor(module, name, (get_tensor(module, name) + offset) / factors)
    if offset:
        # The quotient itself from now on: written as offset + w, small gains would lose their digits.
        shifted = norm.args[2]
        tensor = next(a for a in shifted.args if isinstance(a, Node))
        norm.update_arg(2, tensor)
        module.graph.erase_node(shifted)
    if (bias := norm_bias(norm)) is not None:
        set_tensor(module, bias, get_tensor(module, bias) / factors)
