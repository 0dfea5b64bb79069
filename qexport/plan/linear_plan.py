"""What will happen to every linear, decided from shapes alone before a weight is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph

from ..graph.sites import chooses, linears
from ..quant.formats import GROUP_SIZES, PER_CHANNEL, PER_TENSOR, Scheme
from ..quant.packing import stored_block


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
    for index, (block, graph) in enumerate(graphs, 1):
        shared = {n.target for n in graph.nodes if n.op == "get_attr" and len(n.users) > 1}
        for linear in linears(graph):
            asked = scheme_for(linear.name)
            if asked is not None and (weights.count(linear.weight) > 1 or linear.weight in shared):
                plan = LinearPlan(linear.name, block, linear.shape, None, "its weight is shared by several linears")
            elif asked is not None and chooses(linear, index == len(graphs)):
                plan = LinearPlan(linear.name, block, linear.shape, None, "a router: its result picks experts")
            else:
                scheme, reason = fit(asked, linear.shape[1])
                plan = LinearPlan(linear.name, block, linear.shape, scheme, reason)
            plans.append(replace(plan, bytes=weight_bytes(plan)))
    return plans


def fit(scheme: Scheme | None, in_features: int, whole: bool = False) -> tuple[Scheme | None, str]:
    """The scheme a layer of this width can take, and why it is not the one asked for.

    Args:
        whole: the last group may not be shorter than the others.
    """
    if scheme is None:
        return None, "kept in float by the recipe"
    size = scheme.weight.group_size
    if size in (PER_CHANNEL, PER_TENSOR) or in_features % size == 0:
        return scheme, ""
    if not whole and _takes_part_groups(scheme, in_features):
        return scheme, ""
    smaller = next((g for g in reversed(GROUP_SIZES) if g < size and in_features % g == 0), None)
    if smaller is None:
        return (
            None,
            f"{in_features} input features do not divide into groups of {size} or any smaller power of two down to 16",
        )
    if f"_g{size}" in scheme.name:
        name = scheme.name.replace(f"_g{size}", f"_g{smaller}")
    else:  # nf4 and fp4 alone mean blocks of 64
        name = scheme.name.replace(scheme.weight.codebook, f"{scheme.weight.codebook}_g{smaller}")
    return (
        replace(scheme, name=name, weight=replace(scheme.weight, group_size=smaller)),
        f"{in_features} input features do not divide into groups of {size}: groups of {smaller}",
    )


def _takes_part_groups(scheme: Scheme, in_features: int) -> bool:
    """Whether the last group may be shorter: ONNX's DequantizeLinear and the kernel it fuses to allow it.

    Not so the forms that spell the groups out: codebooks, int8 made at load, blocks that the kernel does not take.
    """
    weight, bits = scheme.weight, scheme.weight.stored_bits
    plain = weight.codebook is None and not scheme.expand and bits > 2
    return plain and in_features > weight.group_size == stored_block(bits, weight.group_size)


def weight_bytes(plan: LinearPlan, float_bytes: int = 4) -> int:
    """Bytes of the weight in the file: codes, scales and zero points.

    Args:
        float_bytes: of a number that stays float; the scales of integer products are float32 whatever it is.
    """
    out_features, in_features = plan.shape
    if plan.scheme is None:
        return out_features * in_features * float_bytes
    weight, bits = plan.scheme.weight, plan.scheme.weight.stored_bits
    rows = 1 if weight.group_size == PER_TENSOR else out_features
    groups = weight.groups(in_features)
    stored = in_features
    if weight.group_size > 0 and not plan.scheme.expand:
        block = stored_block(bits, weight.group_size)
        groups = -(-in_features // block)
        stored = groups * block  # a shorter last block takes the place of a whole one
    scales = rows * groups * (4 if plan.scheme.integer else float_bytes)
    if plan.scheme.expand:
        scales += 4 * out_features
    if weight.symmetric:
        zero_points = 0
    elif weight.group_size > 0 and not plan.scheme.expand:  # every row begins on a byte of its own
        zero_points = rows * -(-groups * bits // 8)
    else:
        zero_points = -(-rows * groups * bits // 8)
    return out_features * stored * bits // 8 + scales + zero_points
