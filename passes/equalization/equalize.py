"""Moving a factor per channel from activations into weights, exactly: what all methods of that kind share."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.edit import add_tensor, call, get_tensor, set_tensor
from ...graph.schema import rebind
from ...graph.sites import FoldSite, fold_sites, linear_at, norm_bias, norm_gain
from ...graph.views import Add, Norm
from ...plan.linear_plan import LinearPlan
from ..base import Context, GraphPass, PassResult, SiteRecord

aten = torch.ops.aten


@dataclass(frozen=True)
class Equalize(GraphPass):
    """Divide the channels of linears' inputs by factors and multiply the weights' columns by them.

    The division goes into what produces the value (a norm's gain and bias, the rows of a linear in front), so that it
    costs nothing. Values whose consumers are all left with float inputs are not touched.

    Attributes:
        plan: by linear name.
        explicit: where nothing can take the division, insert a multiplication instead of skipping the site.
    """

    plan: Mapping[str, LinearPlan]
    explicit: bool = False
    preserves_output: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True

    @abstractmethod
    def observer(self) -> Any:
        """A new statistic of one value's rows."""

    @abstractmethod
    def factors(self, module: GraphModule, site: FoldSite, seen: Any) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Factors for the producer's channels (see `on_producer`), None to leave the site; numbers for the report."""

    def done(  # noqa: B027
        self, site: FoldSite, value: Node, factors: torch.Tensor, context: Context, data: dict[str, Any]
    ) -> None:
        """Called after a fold; value: the node that the consumers read now; data: what `factors` told the report."""

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        return {site.value: self.observer for site in fold_sites(module.graph) if not self._why_not(site)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for site in fold_sites(module.graph):
            names = ", ".join(c.name for c in site.consumers)
            if why := self._why_not(site):
                result.skipped.append(SiteRecord(names, why))
                continue
            factors, data = self.factors(module, site, context.statistics[site.value])
            if factors is None:
                result.skipped.append(SiteRecord(names, data.pop("why"), data))
                continue
            _, where, data = self.move(module, site, factors, context, data)
            result.changed.append(SiteRecord(names, where, data))
        module.recompile()
        return result

    def move(
        self, module: GraphModule, site: FoldSite, factors: torch.Tensor, context: Context, data: dict[str, Any]
    ) -> tuple[Node, str, dict[str, Any]]:
        """Fold and call `done`: the node that the consumers read now, where the factors went, and the report's data."""
        value = fold(module, site, factors)
        self.done(site, value, factors, context, data)
        spread = round((factors.max() / factors.min()).item(), 2)
        return value, f"folded into {_where(site)}", {**data, "largest/smallest factor": spread}

    def _why_not(self, site: FoldSite) -> str:
        return self._why_left(site) or self._no_place(site)

    def _why_left(self, site: FoldSite) -> str:
        """Why the linears of a site give no reason to touch it."""
        plans = [self.plan.get(c.name) for c in site.consumers]
        schemes = [p.scheme for p in plans if p is not None and p.scheme is not None]
        if not schemes:
            return "these linears stay in float"
        if self.for_activations and not any(s.activation is not None for s in schemes):
            return "no input of these linears is quantized"
        return ""

    def _no_place(self, site: FoldSite) -> str:
        """What keeps factors from being moved at a site."""
        if site.kind == "explicit" and not (self.explicit and site.scalable):
            return f"no place for the factor: {site.why}"
        return ""


def _where(site: FoldSite) -> str:
    return {"norm": "the norm", "rows": "the rows of the linear in front", "explicit": "a multiplication"}[site.kind]


def on_producer(site: FoldSite, channels: torch.Tensor) -> torch.Tensor:
    """The largest entry for each channel of the producer, of a vector [in_features of the consumers].

    They differ where query heads share a kv head: one channel of the values then feeds several input features.
    """
    if site.repeat is None:
        return channels
    kv_heads, queries, head_dim = site.repeat
    return channels.view(kv_heads, queries, head_dim).amax(dim=1).reshape(-1)


def on_consumers(site: FoldSite, factors: torch.Tensor) -> torch.Tensor:
    """A vector over the producer's channels as one over the consumers' in_features."""
    if site.repeat is None:
        return factors
    kv_heads, queries, head_dim = site.repeat
    return factors.view(kv_heads, 1, head_dim).expand(kv_heads, queries, head_dim).reshape(-1)


def fold(module: GraphModule, site: FoldSite, factors: torch.Tensor) -> Node:
    """Divide the value of a site by per-channel factors and multiply its consumers' weights, in place.

    Args:
        factors: positive, one for each channel of the producer: in_features of the consumers, or kv_heads * head_dim
            where the site repeats kv heads.

    Returns:
        The node that the consumers read now.

    Raises:
        PassError: the site is not scalable.
    """
    if not site.scalable:
        raise PassError(site.why, place=site.consumers[0].name, remedy="Skip sites that are not scalable")
    columns = on_consumers(site, factors)
    for weight in {c.weight for c in site.consumers}:
        set_tensor(module, weight, get_tensor(module, weight) * columns)
    producer = site.producer
    if site.kind == "norm" and producer is not None:
        _divide_norm(module, producer, factors)
        return site.value
    if producer is not None and (linear := linear_at(producer)) is not None:
        set_tensor(module, linear.weight, get_tensor(module, linear.weight) / factors[:, None])
        if linear.bias is not None:
            set_tensor(module, linear.bias, get_tensor(module, linear.bias) / factors)
        return site.value
    graph = module.graph
    with graph.inserting_after(site.value):
        inverse = add_tensor(graph, f"{site.consumers[0].name}.input_factor", 1.0 / factors)
    with graph.inserting_after(inverse):
        scaled = call(graph, aten.mul.Tensor, (site.value, inverse), like=site.value)
    for consumer in site.consumers:
        reader = consumer.node if consumer.input is site.value else consumer.input
        reader.replace_input_with(site.value, scaled)
    return scaled


def _divide_norm(module: GraphModule, norm: Node, factors: torch.Tensor) -> None:
    name, offset = norm_gain(norm)
    set_tensor(module, name, (get_tensor(module, name) + offset) / factors)
    if offset:
        # The quotient itself from now on: written as offset + w, small gains would lose their digits.
        shifted = Norm.of(norm).weight
        rebind(norm, weight=Add.of(shifted).x)
        if shifted is not None:
            module.graph.erase_node(shifted)
    if (bias := norm_bias(norm)) is not None:
        set_tensor(module, bias, get_tensor(module, bias) / factors)
