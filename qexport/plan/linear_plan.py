"""What will happen to every linear, decided from shapes alone before a weight is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph

from ..graph.sites import Linear, chooses, linears
from ..models.checkpoint import GivenCodes
from ..quant.formats import ActivationFormat, Scheme


class Planned:
    """What may be quantized.

    Attributes:
        name: its module path; block: the block it is in; shape: of its weight.
        scheme: None keeps it in float; reason: why, where there is something to say.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    reason: str

    @property
    def chosen(self) -> Scheme:
        """The scheme of what is quantized.

        Raises:
            TypeError: it stays in float.
        """
        if self.scheme is None:
            raise TypeError(f"{self.name} stays in float")
        return self.scheme

    @property
    def activation(self) -> ActivationFormat | None:
        """The format of its input; None where that stays in float."""
        return None if self.scheme is None else self.scheme.activation


@dataclass(frozen=True)
class LinearPlan(Planned):
    """The decision for one linear.

    Attributes:
        name: its module path; block: the block it is in; shape: (out_features, in_features).
        scheme: formats of weight and input; None keeps it in float.
        reason: why the scheme differs from what was asked for, or why there is none; empty when as asked.
        bytes: size of weight codes, scales and zero points in the file, or of the float32 weight.
        given: the codes that the checkpoint holds, and that the scheme keeps; None where they are to be found.
    """

    name: str
    block: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""
    bytes: int = 0
    given: GivenCodes | None = field(default=None, repr=False, compare=False)


def make_plan(
    graphs: Sequence[tuple[str, Graph]],
    scheme_for: Callable[[str], Scheme | None],
    given: Mapping[str, GivenCodes] | None = None,
) -> list[LinearPlan]:
    """Decide for every linear of the blocks.

    Args:
        graphs: (block name, graph) in order.
        scheme_for: the scheme asked for by linear name; None for float.
        given: by weight, codes that are to be kept as they are.
    """
    weights = [linear.weight for _, graph in graphs for linear in linears(graph)]
    plans = []
    for index, (block, graph) in enumerate(graphs, 1):
        shared = {n.target for n in graph.nodes if n.op == "get_attr" and len(n.users) > 1}
        for linear in linears(graph):
            asked, codes = scheme_for(linear.name), (given or {}).get(linear.weight)
            if codes is not None:
                plan = _kept(linear, block, codes, weights.count(linear.weight) > 1 or linear.weight in shared)
            elif asked is not None and (weights.count(linear.weight) > 1 or linear.weight in shared):
                plan = LinearPlan(linear.name, block, linear.shape, None, "its weight is shared by several linears")
            elif asked is not None and chooses(linear, index == len(graphs)):
                plan = LinearPlan(linear.name, block, linear.shape, None, "a router: its result picks experts")
            else:
                scheme, reason = fit(asked, linear.shape[1])
                plan = LinearPlan(linear.name, block, linear.shape, scheme, reason)
            plans.append(replace(plan, bytes=weight_bytes(plan)))
    return plans


def _kept(linear: Linear, block: str, codes: GivenCodes, shared: bool) -> LinearPlan:
    """What becomes of a linear whose codes are given."""
    weight = codes.weight
    if shared:
        why = "its codes become float: the weight is shared by several linears"
        return LinearPlan(linear.name, block, linear.shape, None, why)
    return LinearPlan(linear.name, block, linear.shape, weight.scheme, weight.kept, given=codes)


def fit(scheme: Scheme | None, in_features: int, whole: bool = False) -> tuple[Scheme | None, str]:
    """The scheme a layer of this width can take, and why it is not the one asked for.

    Args:
        whole: the last group may not be shorter than the others.
    """
    if scheme is None:
        return None, "kept in float by the recipe"
    return scheme.fit(in_features, whole)


def weight_bytes(plan: LinearPlan, float_bytes: int = 4) -> int:
    """Bytes of the weight in the file: codes, scales and zero points.

    Args:
        float_bytes: of a number that stays float; the scales of integer products are float32 whatever it is.
    """
    out_features, in_features = plan.shape
    if plan.scheme is None:
        return out_features * in_features * float_bytes
    return plan.scheme.bytes(plan.shape, float_bytes)
