"""What every convolution becomes, decided from shapes alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Graph

from ..graph.convolution_sites import convolutions
from ..graph.views import Convolution, sizes_of
from ..quant.formats import IntegerFormat, Scheme
from .linear_plan import Planned


@dataclass(frozen=True)
class ConvolutionPlan(Planned):
    """The decision for one convolution.

    Attributes:
        name: its module path; block: the block it is in; shape: of its weight, [out, in, ...].
        scheme: None keeps it in float; reason: why, or empty.
        bytes: of its weight in the file.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    reason: str = ""
    bytes: int = 0


def plan_convolutions(
    graphs: Sequence[tuple[str, Graph]],
    scheme_for: Callable[[str], Scheme | None],
    none_for: Callable[[Sequence[int], int], str],
) -> list[ConvolutionPlan]:
    """Decide for every convolution of the blocks.

    Args:
        graphs: (block name, graph) in order.
        scheme_for: the scheme asked for by name; None for float.
        none_for: why the target leaves one in float, by the shape of its weight and its groups; empty where it does
            not.
    """
    found = [Convolution.match(node) for _, graph in graphs for node in graph.nodes]
    weights = [conv.weight.target for conv in found if conv is not None]
    plans = []
    for block, graph in graphs:
        for name, node in convolutions(graph).items():
            scheme, convolution = scheme_for(name), Convolution.of(node)
            weight = convolution.weight
            shape, shared = sizes_of(weight), weights.count(weight.target) > 1 or len(weight.users) > 1
            reason = _reason(scheme, shared) or none_for(shape, convolution.groups)
            scheme = None if reason else scheme
            size = math.prod(shape) * (1 if scheme else 4)
            plans.append(ConvolutionPlan(name, block, shape, scheme, reason, size))
    return plans


def _reason(scheme: Scheme | None, shared: bool) -> str:
    if scheme is None:
        return "kept in float by the recipe"
    activation = scheme.activation
    fits = scheme.weight == IntegerFormat(8)
    if not fits or activation is None or activation.kind != "static" or activation.bits != 8:
        return f"{scheme.name} has no convolution: w8a8_static has one"
    return "its weight is used several times" if shared else ""
