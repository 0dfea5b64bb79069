"""The products that a CUDA file will have, told from the plan of an export, before a weight is read."""

from collections.abc import Mapping, Sequence

from torch.fx import Graph

from ...graph.sites import by_input, linears
from ...lower.fuse_parallel_linears import joint_name
from ...lower.moe_form import ExpertWeights, Gate, MoeForm
from ...passes.formats import form_for
from ...passes.moe_coverage import of_experts
from ...plan.linear_plan import LinearPlan
from ...quant.formats import PER_TENSOR, Scheme
from . import fpa_intb
from .qmoe import why_dense_on_cuda


def slow_linears(graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> dict[str, str]:
    """Why a linear's MatMulNBits is not ONNX Runtime's fastest on CUDA, as the manifest will say; empty where it is.

    Args:
        graphs: of all blocks; plan: by linear name.

    Returns:
        By linear name, those linears that become MatMulNBits.
    """
    together = _together(graphs, plan)
    plan = {name: linear for name, linear in plan.items() if name not in together}
    products: dict[str, fpa_intb.Product] = {}
    members: dict[str, list[str]] = {}
    for names, scheme in _merged(graphs, plan):
        shapes = [plan[name].shape for name in names]
        product = joint_name(names) if len(names) > 1 else names[0]
        products[product] = fpa_intb.planned(scheme.weight, (sum(n for n, _ in shapes), shapes[0][1]))
        members[product] = names
    slow = fpa_intb.why_slow(products)
    return {name: slow[product] for product, names in members.items() for name in names}


def _together(graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> set[str]:
    """Linears of experts that will be one node of another kernel, as far as shapes and schemes tell."""
    found: set[str] = set()
    for graph in graphs:
        experts = [p for linear in of_experts(graph) if (p := plan[linear.name]).scheme is not None]
        kinds = [scheme for p in experts if (scheme := p.scheme) is not None]
        if len(set(kinds)) != 1:
            continue
        scheme = kinds[0]
        # Small floats are no MatMulNBits, together or apart.
        weight = ExpertWeights(scheme.weight.stored_bits, scheme.weight.group_size, scheme.weight.has_zero_points)
        widths = {p.shape[1] for p in experts}
        form = MoeForm(min(widths), max(widths), weight, weight, Gate("swiglu"))
        if scheme.table and not form.why_dense() and not why_dense_on_cuda(form):
            found |= {p.name for p in experts}
    return found


def _merged(graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> list[tuple[list[str], Scheme]]:
    """Linears that will be one product of float inputs and integer weights, and their scheme."""
    found: list[tuple[list[str], Scheme]] = []
    for graph in graphs:
        for readers in by_input(linears(graph)).values():
            groups: dict[Scheme, list[str]] = {}
            for name in (linear.name for linear in readers if linear.name in plan):
                scheme = plan[name].scheme
                if scheme is not None and not scheme.integer and form_for(scheme.weight).kernel == "MatMulNBits":
                    groups.setdefault(scheme, []).append(name)
            for scheme, names in groups.items():
                alone = scheme.weight.group_size == PER_TENSOR  # their scales cannot stand side by side
                found += [([name], scheme) for name in names] if alone else [(names, scheme)]
    return found
