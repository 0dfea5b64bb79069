"""What will happen to every linear, decided from shapes alone before a weight is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph

from ..numerics.formats import PER_CHANNEL, PER_TENSOR, Scheme
from .sites import linears

_GROUPS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class LinearPlan:
    """The decision for one linear.

    Attributes:
        name: its module path; block: the block it is in; shape: (out_features, in_features).
        scheme: formats of weight and input; None keeps it in float.
        reason: why the scheme differs from what was asked for, or why there is none; empty when as asked.
        bytes: size of weight codes, scales and zero points in the file, or of the float32 weight.
    """

    name: str
    block: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""
    bytes: int = 0


def make_plan(graphs: Sequence[tuple[str, Graph]], scheme_for: Callable[[str], Scheme | None]) -> list[LinearPlan]:
    """Decide for every linear of the blocks.

    Args:
        graphs: (block name, graph) in order.
        scheme_for: the scheme asked for by linear name; None for float.
    """
    weights = [linear.weight for _, graph in graphs for linear in linears(graph)]
    plans = []
    for block, graph in graphs:
        shared = {n.target for n in graph.nodes if n.op == "get_attr" and len(n.users) > 1}
        for linear in linears(graph):
            asked = scheme_for(linear.name)
            if asked is not None and (weights.count(linear.weight) > 1 or linear.weight in shared):
                plan = LinearPlan(linear.name, block, linear.shape, None, "its weight is shared by several linears")
            else:
                scheme, reason = fit(asked, linear.shape[1])
                plan = LinearPlan(linear.name, block, linear.shape, scheme, reason)
            plans.append(replace(plan, bytes=weight_bytes(plan)))
    return plans


def fit(scheme: Scheme | None, in_features: int) -> tuple[Scheme | None, str]:
    """The scheme a layer of this width can take, and why it is not the one asked for."""
    if scheme is None:
        return None, "kept in float by the recipe"
    size = scheme.weight.group_size
    if size in (PER_CHANNEL, PER_TENSOR) or in_features % size == 0:
        return scheme, ""
    smaller = next((g for g in _GROUPS if g < size and in_features % g == 0), None)
    if smaller is None:
        return (
            None,
            f"{in_features} input features do not divide into groups of {size} or any smaller power of two down to 16",
        )
    name = scheme.name.replace(f"_g{size}", f"_g{smaller}")
    return (
        Scheme(name, replace(scheme.weight, group_size=smaller), scheme.activation),
        f"{in_features} input features do not divide into groups of {size}: groups of {smaller}",
    )


def weight_bytes(plan: LinearPlan, float_bytes: int = 4) -> int:
    """Bytes of the weight in the file: codes, scales of float_bytes each, and zero points."""
    out_features, in_features = plan.shape
    if plan.scheme is None:
        return out_features * in_features * float_bytes
    weight = plan.scheme.weight
    scales = 1 if weight.group_size == PER_TENSOR else out_features * weight.groups(in_features)
    codes = out_features * in_features * weight.bits // 8
    zero_points = 0 if weight.symmetric else scales * weight.bits // 8
    return codes + scales * float_bytes + zero_points
