"""The main directions of a weight go through a float branch before the rest is rounded (SVDQuant, arXiv 2411.05007).

A weight W becomes L + R with L of low rank, and y = Q(x) Q(R)^T + x L^T: the branch reads x as it is. What rounding x
costs is multiplied with R and no longer with W, and R has a smaller range. After smoothing or a rotation the few large
directions of W are where the outliers went. L is the truncated singular value decomposition of W, then in turns that
of W - Q(R), as in the paper, as long as the expected error falls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph.edit import finish, get_tensor, set_tensor
from ...graph.meta import Meta
from ...graph.sites import Linear, by_input, linears
from ...plan.linear_plan import LinearPlan
from ...quant.formats import ActivationFormat
from ...quant.lowrank import low_rank
from ...recipe.methods import Branch
from ...recipe.registry import Stage, method
from ..base import Context, GraphPass, PassResult, SiteRecord
from ..insert_qdq import add_branch
from .factors import product_of

_LARGEST_OVER_RMS = 3.3  # of a token with the number of features that linears have, normally distributed


@method("branches", "svdquant")
class SVDQuantSection(Branch):
    """A low-rank branch that takes the main directions of a weight before the rest is rounded (arXiv 2411.05007).

    Attributes:
        rank: of the branch.
        factors: "float", or "int8" with one scale per column.
        shared: linears that read one value (q, k and v; gate and up) share the first factor.
        turns: most times that the branch is found again, for what rounding left.
    """

    rank: int = Field(32, ge=1, le=65_536)
    factors: Literal["float", "int8"] = "float"
    shared: bool = True
    turns: int = Field(4, ge=0, le=100)
    stage: ClassVar[Stage] = Stage.SEPARATE

    @property
    def ungrouped(self) -> tuple[str, str] | None:
        if self.factors == "float":
            return None
        return "int8 factors of svdquant have one scale per column", "set svdquant to factors: float"

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [SVDQuant(plan, self.rank, self.factors == "int8", self.shared, self.turns)]


@dataclass(frozen=True)
class SVDQuant(GraphPass):
    """y = Q(x) Q(W - L)^T + (x down) up, before weights and activations are rounded.

    Attributes:
        plan: by linear name; linears without a scheme get no branch.
        rank: of every branch, cut to the smaller side of the weight.
        int8: factors in int8, one scale for each column.
        shared: linears that read one value and are quantized alike have one `down`.
        turns: most times that the branch is found again.
    """

    plan: Mapping[str, LinearPlan]
    rank: int = 32
    int8: bool = False
    shared: bool = True
    turns: int = 4
    preserves_values: ClassVar[bool] = True

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for value, readers in by_input(linears(module.graph)).items():
            for group in self._groups(readers):
                result.changed += self._split(module, value, group)
        left = {linear.name for linear in linears(module.graph) if not self._planned(linear)}
        result.skipped += [SiteRecord(name, "stays in float") for name in sorted(left)]
        finish(module)
        return result

    def _planned(self, linear: Linear) -> bool:
        plan = self.plan.get(linear.name)
        return plan is not None and plan.scheme is not None

    def _groups(self, readers: Sequence[Linear]) -> list[list[Linear]]:
        groups: dict[object, list[Linear]] = {}
        for linear in filter(self._planned, readers):
            key = self.plan[linear.name].activation if self.shared else linear.name
            groups.setdefault(key, []).append(linear)
        return list(groups.values())

    def _split(self, module: GraphModule, value: Node, group: list[Linear]) -> list[SiteRecord]:
        whole = torch.cat([get_tensor(module, linear.weight) for linear in group])
        down, up, turns = self._branch(whole, group)
        parts = up.split([linear.shape[0] for linear in group], dim=1)
        first, narrow, notes = group[0], None, []
        for linear, part in zip(group, parts, strict=True):
            weight = get_tensor(module, linear.weight)
            with module.graph.inserting_before(linear.node.next):
                if narrow is None:
                    narrow, stored = product_of(module, value, f"{first.name}.svd_down", down, first.name, self.int8)
                name = f"{linear.name}.svd_up"
                branch, second = product_of(module, narrow, name, part.contiguous(), linear.name, self.int8)
            rest = weight - (stored @ second).t()
            set_tensor(module, linear.weight, rest)
            linear.node.meta[Meta.RESULT_OF] = linear.name
            add_branch(module, linear.name, branch)
            kept = float(rest.double().square().sum() / weight.double().square().sum().clamp_min(1e-30))
            notes.append(
                SiteRecord(linear.name, f"a branch of rank {down.shape[1]}", {"norm left": kept, "turns": turns})
            )
        return notes

    def _branch(self, whole: Tensor, group: Sequence[Linear]) -> tuple[Tensor, Tensor, int]:
        """Both factors for stacked weights, and after how many turns."""
        activation = self.plan[group[0].name].activation
        found, best, target = None, float("inf"), whole
        for turn in range(self.turns + 1):
            down, up = low_rank(target, self.rank)
            rest = whole - (down @ up).t()
            rounded = self._rounded(rest, group)
            error = _expected(rest, rounded, activation)
            if error >= best:
                break
            found, best, target = (down, up, turn), error, whole - rounded
        if found is None:
            raise TypeError("a weight without finite numbers")
        return found

    def _rounded(self, rest: Tensor, group: Sequence[Linear]) -> Tensor:
        parts = rest.split([linear.shape[0] for linear in group])
        schemes = [self.plan[linear.name].chosen for linear in group]
        return torch.cat([scheme.weight.rounded(part) for scheme, part in zip(schemes, parts, strict=True)])


def _expected(rest: Tensor, rounded: Tensor, activation: ActivationFormat | None) -> float:
    """The squared error of a product, for inputs of unit power: of the rounded rest, and of rounded inputs times it."""
    own = float((rest - rounded).double().square().sum())
    if activation is None:
        return own
    step = _LARGEST_OVER_RMS / activation.qmax
    return own + step**2 / 12 * float(rest.double().square().sum())
