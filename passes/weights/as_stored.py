"""The codes that a checkpoint holds: nothing is rounded, and every weight is compared with its method's own formula."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...artifact.feature_order import packed
from ...errors import PassError, within
from ...graph.edit import add_tensor, call, finish, get_tensor, shape_of
from ...graph.meta import Meta
from ...graph.sites import Linear, linears
from ...models.checkpoint import GivenCodes, check_finite
from ...models.coded import Given, Order
from ...plan.linear_plan import LinearPlan
from ...recipe.methods import BlockMethod, CacheMethod, ModelMethod, WeightMethod
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, SiteRecord
from ..insert_qdq import add_branch, insert_weight, result_of
from .folded_orders import FoldedOrders, fold_orders

if TYPE_CHECKING:
    from ...recipe.recipe import Recipe

aten = torch.ops.aten
# A code times its scale in float32 is within half a rounding of the formula in float64; formulas that compute scales
# in float32 round some three times more.
_ROUNDED, _TINY = 4 * torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


@method("weights", "as_stored")
class AsStoredSection(WeightMethod):
    """Keep the codes of a checkpoint that is quantized already; what is float there is rounded to nearest, or stays."""

    keeps_codes: ClassVar[bool] = True

    def check(self, recipe: "Recipe") -> None:
        other = next(
            (m for m in recipe.methods if isinstance(m, (ModelMethod, BlockMethod)) and not _goes_with(m)), None
        )
        if other is not None:
            raise ValueError(f"{other.key} changes weights, whose codes are kept", f"Remove {other.key}")

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [KeepCodes(plan)]


def _goes_with(other: Any) -> bool:
    return isinstance(other, (WeightMethod, CacheMethod))


@dataclass(frozen=True)
class KeepCodes(GraphPass):
    """The codes of the checkpoint for every linear that has some; the nearest ones for others with a scheme.

    Attributes:
        plan: by linear name.
    """

    plan: Mapping[str, LinearPlan]
    preserves_values: ClassVar[bool] = True

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result, inputs, offsets = PassResult(), _Inputs(module), _Offsets(module)
        folded = fold_orders(module, self._given(module))
        for linear in linears(module.graph):
            decided = self.plan.get(linear.name)
            if decided is None or (decided.scheme is None and decided.given is None):
                result.skipped.append(SiteRecord(linear.name, "not in the plan" if decided is None else decided.reason))
                continue
            if decided.given is None:
                with within(linear.name):
                    insert_weight(module, linear, decided.chosen.weight.round_to_nearest(_weight(module, linear)))
                what = f"{decided.chosen.name}, rounded to nearest: it is float in the checkpoint"
                result.changed.append(SiteRecord(linear.name, what))
                continue
            if (found := folded.given.get(linear.name)) is None:
                result.skipped.append(SiteRecord(linear.name, decided.reason))
                continue
            if found.factor is not None:
                inputs.multiply(linear, found.factor)
            if found.order is not None:
                inputs.reorder(linear, found.order)
            if found.input_scale is not None:
                context.handover.input_scales[linear.name] = found.input_scale
            value = linear.input
            insert_weight(module, linear, found.weight)
            if found.offset is not None:
                size = found.weight.format.group_size
                offsets.add(linear.name, value, found.offset, size if size > 0 else linear.shape[1])
            _note_orders(result_of(module, linear.name), folded, linear.name)
            what = f"{decided.chosen.name}, {decided.reason}{_how_ordered(folded, linear.name)}"
            result.changed.append(SiteRecord(linear.name, what))
        finish(module)
        return result

    def _given(self, module: GraphModule) -> dict[str, Given]:
        """The codes of every linear that keeps some, by name."""
        found = {}
        for linear in linears(module.graph):
            decided = self.plan.get(linear.name)
            if decided is not None and decided.given is not None:
                with within(linear.name):
                    codes = proved(decided.given)
                if isinstance(codes, Given):
                    found[linear.name] = codes
        return found


def _note_orders(result: Node, folded: FoldedOrders, name: str) -> None:
    if name in folded.inputs or name in folded.results:
        orders = (folded.inputs.get(name), folded.results.get(name))
        result.meta[Meta.ORDERS] = {name: tuple("" if o is None else packed(o.numpy()) for o in orders)}


def _how_ordered(folded: FoldedOrders, name: str) -> str:
    if name in folded.inputs:
        return ": folded into the rows of what makes them"
    return f": by a Gather, as {why}" if (why := folded.refused.get(name)) else ""


def proved(codes: GivenCodes) -> Given | Tensor:
    """The codes of a weight, once they stand for what its method's formula makes of the stored tensors.

    Raises:
        PassError: they do not.
        NumericsError: they stand for NaN or Inf.
    """
    found = codes.decode()
    values, formula = found.dequantize() if isinstance(found, Given) else found, codes.formula()
    check_finite(values, codes.weight.name)
    off = (values.double() - formula).abs() > _ROUNDED * formula.abs() + _TINY
    if bool(off.any()):
        row, column = (int(place) for place in off.nonzero()[0])
        raise PassError(
            f"{int(off.sum())} of {off.numel()} weights differ from the formula of their method, first "
            f"{float(values[row, column]):.9g} instead of {float(formula[row, column]):.9g} at {row}, {column}",
            remedy="One of the two readings is wrong: please report it with the model's name",
        )  # fmt: skip
    return found


def _weight(module: GraphModule, linear: Linear) -> Tensor:
    return get_tensor(module, linear.weight)


class _Inputs:
    """What codes read instead of the inputs: one for all linears of one value that ask for the same."""

    def __init__(self, module: GraphModule):
        self._module = module
        self._made: list[tuple[Node, Tensor, Node]] = []

    def reorder(self, linear: Linear, order: Order) -> None:
        """Let a linear read its input in an order of features."""

        def take(value: Node, features: Node) -> Node:
            return call(self._module.graph, aten.index_select.default, (value, -1, features), like=value)

        self._replace(linear, "input_order", order.features, take)

    def multiply(self, linear: Linear, factor: Tensor) -> None:
        """Let a linear read its input times a factor for each feature."""

        def times(value: Node, factors: Node) -> Node:
            return call(self._module.graph, aten.mul.Tensor, (value, factors), like=value)

        self._replace(linear, "input_factor", factor, times)

    def _replace(self, linear: Linear, what: str, tensor: Tensor, make: Callable[[Node, Node], Node]) -> Node:
        value, graph = linear.input, self._module.graph
        node = next((n for v, t, n in self._made if v is value and torch.equal(t, tensor)), None)
        if node is None:
            with graph.inserting_before(linear.node):
                node = make(value, add_tensor(graph, f"{linear.name}.{what}", tensor))
            node.meta[Meta.REORDERED] = True
            self._made.append((value, tensor, node))
        linear.node.replace_input_with(value, node)
        return node


class _Offsets:
    """What groups of weights have beside codes and scales, as products of the sums of the inputs of a group.

    x (W + offset) = x W + (sums of x) offset, with an offset [N, G] for the groups of each row. Linears of one value
    share the sums.
    """

    def __init__(self, module: GraphModule):
        self._module = module
        self._sums: dict[tuple[Node, int], Node] = {}

    def add(self, name: str, value: Node, offset: Tensor, size: int) -> None:
        """Add them to the result of a linear.

        Args:
            value: that it reads; offset: [N, G]; size: of a group.
        """
        graph = self._module.graph
        with graph.inserting_before(result_of(self._module, name).next):
            sums = self._sums.get((value, size))
            if sums is None:
                sums = self._sums[value, size] = _sums(graph, value, size)
            factor = add_tensor(graph, f"{name}.group_offsets", offset.t().float().contiguous())
            shape = (*shape_of(sums)[:-1], offset.shape[0])
            branch = call(graph, aten.matmul.default, (sums, factor), like=sums, shape=shape)
            branch.meta[Meta.BRANCH_OF] = name
        add_branch(self._module, name, branch)


def _sums(graph: Graph, value: Node, size: int) -> Node:
    """Over every `size` features of a value."""
    *outer, features = shape_of(value)
    groups = int(features) // size
    apart = call(graph, aten.unflatten.int, (value, -1, [groups, size]), like=value, shape=(*outer, groups, size))
    return call(graph, aten.sum.dim_IntList, (apart, [-1]), like=value, shape=(*outer, groups))
