"""A low-rank branch beside each rounded weight gives back the main directions of its error (LoRC, arXiv 2303.08302)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.edit import finish, get_tensor
from ...graph.meta import Meta
from ...graph.sites import linears
from ...graph.views import Matmul, operand, tensor_name
from ...plan.linear_plan import LinearPlan
from ...quant.lowrank import low_rank, share_removed
from ...quant.observers import ChannelMeanAbs
from ...recipe.methods import Branch
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, PassState, SiteRecord
from ..insert_qdq import add_branch, result_of
from .factors import product_of


@method("branches", "lorc")
class LoRCSection(Branch):
    """A low-rank branch that gives back part of the weights' rounding error (LoRC, arXiv 2303.08302).

    Attributes:
        rank: of the branch.
        factors: "float", or "int8" with one scale per column.
        shared: linears that read one value (q, k and v; gate and up) share the first factor.
        weighted: weigh the error of each input feature by its mean magnitude (LQER, arXiv 2402.02446); calibrates.
    """

    rank: int = Field(8, ge=1, le=65_536)
    factors: Literal["float", "int8"] = "float"
    shared: bool = False
    weighted: bool = False

    @property
    def needs_calibration(self) -> bool:
        return self.weighted

    @property
    def ungrouped(self) -> tuple[str, str] | None:
        if self.factors == "float":
            return None
        return "int8 factors of lorc have one scale per column", "set lorc to factors: float"

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [LoRC(plan, self.rank, self.factors == "int8", self.shared, self.weighted)]


@dataclass(frozen=True)
class LoRC(GraphPass):
    """y = x W_rounded + (x down) up, where down up is the best approximation of what rounding took from the weight.

    Runs after the weights are rounded, by whatever method, and before activations are: the branch reads the float
    value. A branch costs rank * (K + N) numbers for a weight [N, K], and two thin products.

    Attributes:
        plan: by linear name; linears without a scheme get no branch.
        rank: of every branch, cut to the smaller side of the weight.
        int8: factors in int8, one scale for each column, so that they become weight-only products.
        shared: linears that read one value have one `down`. Their errors are stacked and share `rank` directions: for
            three of them that is rank * (K + 3N) numbers instead of rank * (3K + 3N) and two products less, but at the
            same rank less of each one's error is removed. Linears whose inputs will be quantized do not share with
            those whose inputs stay float.
        weighted: errors count by the mean magnitude of their input feature (LQER, arXiv 2402.02446).
    """

    plan: Mapping[str, LinearPlan]
    rank: int = 8
    int8: bool = False
    shared: bool = False
    weighted: bool = False
    reads_float_weights: ClassVar[bool] = True
    preserves_values: ClassVar[bool] = True

    def requires(self, module: GraphModule) -> None:
        for linear in linears(module.graph):
            if linear.name in self.plan and self.plan[linear.name].scheme is not None:
                raise PassError(
                    f"the weight of {linear.name} is not rounded yet",
                    remedy="Put a pass that rounds weights, such as RoundToNearest, in front of this one",
                )

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        if not self.weighted:
            return {}
        return {operand(products[0]): ChannelMeanAbs for products in products_of(module, self.plan).values()}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for linear in linears(module.graph):
            why = self.plan[linear.name].reason if linear.name in self.plan else "not in the plan"
            result.skipped.append(SiteRecord(linear.name, why))
        products = products_of(module, self.plan)
        for names in self._groups(products):
            value = operand(products[names[0]][0])
            errors = [float_weight(context.handover, name) - deployed_weight(module, products[name]) for name in names]
            if not any(bool(error.any()) for error in errors):
                result.skipped += [SiteRecord(name, "rounding left no error") for name in names]
                continue
            importance = context.statistics[value].mean() if self.weighted else None
            down, up = low_rank(torch.cat(errors), self.rank, importance)
            result.changed += self._insert(module, value, dict(zip(names, errors, strict=True)), down, up)
        finish(module)
        return result

    def _groups(self, products: Mapping[str, list[Node]]) -> list[list[str]]:
        if not self.shared:
            return [[name] for name in products]
        groups: dict[tuple[Node, bool], list[str]] = {}
        for name, nodes in products.items():
            groups.setdefault((operand(nodes[0]), self.plan[name].chosen.activation is None), []).append(name)
        return list(groups.values())

    def _insert(
        self, module: GraphModule, value: Node, errors: Mapping[str, torch.Tensor], down: torch.Tensor, up: torch.Tensor
    ) -> list[SiteRecord]:
        """Add the branches of linears that share `down`; up: their factors side by side."""
        first, notes, narrow = next(iter(errors)), [], None
        for (name, error), part in zip(errors.items(), up.split([len(e) for e in errors.values()], dim=1), strict=True):
            with module.graph.inserting_before(result_of(module, name).next):
                if narrow is None:
                    narrow, stored_down = product_of(module, value, f"{first}.lorc_down", down, first, self.int8)
                branch, stored_up = product_of(
                    module, narrow, f"{name}.lorc_up", part.contiguous(), name, self.int8
                )
            add_branch(module, name, branch)
            data: dict[str, Any] = {
                "rank": down.shape[1], "error removed": round(share_removed(error, stored_down, stored_up), 6),
                "factors": "int8" if self.int8 else "float",
            }  # fmt: skip
            if len(errors) > 1:
                data["shares with"] = [other for other in errors if other != name]
            notes.append(SiteRecord(name, f"a branch of rank {down.shape[1]}", data))
        return notes


def products_of(module: GraphModule, plan: Mapping[str, LinearPlan]) -> dict[str, list[Node]]:
    """The products of every rounded linear of the plan; they are several where its weight is a sum of planes."""
    found: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        name = node.meta.get(Meta.PLANE_OF) or node.meta.get(Meta.LINEAR)
        if name in plan:
            found.setdefault(name, []).append(node)
    return found


def float_weight(handover: PassState, name: str) -> torch.Tensor:
    """The weight [N, K] of a linear before it was rounded.

    Raises:
        PassError: the pass that rounded it kept none.
    """
    if name not in handover.weights:
        raise PassError(
            f"the float weight of {name} was not kept", remedy="Run this pass in one Pipeline with the rounding"
        )
    return handover.weights[name]


def deployed_weight(module: GraphModule, products: Sequence[Node]) -> torch.Tensor:
    """The weight [N, K] that the products of a linear stand for, as the graph computes it from its constants."""
    planes = (_constant(module, Matmul.of(product).weight) for product in products)
    return reduce(torch.add, planes).t()


def _constant(module: GraphModule, node: Node) -> torch.Tensor:
    if node.op == "get_attr":
        return get_tensor(module, tensor_name(node))
    if node.op != "call_function" or not callable(node.target):
        raise PassError(f"the weight {node.name} depends on an input of the block")
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _constant(module, n))
    value: torch.Tensor = node.target(*arguments[0], **arguments[1])
    return value
