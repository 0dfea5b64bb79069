"""The products that a CUDA file will have, told from the plan of an export, before a weight is read."""

from collections.abc import Mapping, Sequence

from torch.fx import Graph

from ..numerics.formats import PER_TENSOR, Scheme
from ..passes.plan import LinearPlan
from ..passes.sites import by_input, linears
from .merge import joint_name
from .targets import fpa_intb


def slow_linears(graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> dict[str, str]:
    """Why a linear's MatMulNBits is not ONNX Runtime's fastest on CUDA, as the manifest will say; empty where it is.

    Args:
        graphs: of all blocks; plan: by linear name.

    Returns:
        By linear name, those linears that become MatMulNBits.
    """
    products: dict[str, fpa_intb.Product] = {}
    members: dict[str, list[str]] = {}
    for names, scheme in _merged(graphs, plan):
        shapes = [plan[name].shape for name in names]
        product = joint_name(names) if len(names) > 1 else names[0]
        products[product] = fpa_intb.planned(scheme.weight, (sum(n for n, _ in shapes), shapes[0][1]))
        members[product] = names
    slow = fpa_intb.why_slow(products)
    return {name: slow[product] for product, names in members.items() for name in names}


def _merged(graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> list[tuple[list[str], Scheme]]:
    """Linears that will be one product of float inputs and integer weights, and their scheme."""
    found: list[tuple[list[str], Scheme]] = []
    for graph in graphs:
        for readers in by_input(linears(graph)).values():
            groups: dict[Scheme, list[str]] = {}
            for name in (linear.name for linear in readers):
                scheme = plan[name].scheme
                if scheme is not None and not scheme.integer and scheme.weight.codebook is None:
                    groups.setdefault(scheme, []).append(name)
            for scheme, names in groups.items():
                alone = scheme.weight.group_size == PER_TENSOR  # their scales cannot stand side by side
                found += [([name], scheme) for name in names] if alone else [(names, scheme)]
    return found
