"""Input features with outliers take a float path beside the quantized product (LLM.int8(), arXiv 2208.07339)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.fx import GraphModule, Node

from ...graph.edit import add_tensor, call, finish, get_tensor, set_tensor, shape_of
from ...graph.meta import Meta
from ...graph.sites import linear_at, linears
from ...graph.views import operand, size_at
from ...plan.linear_plan import LinearPlan
from ...quant.observers import ChannelAbsmax
from ...recipe.methods import Branch
from ...recipe.registry import Stage, method
from ..base import Context, GraphPass, PassResult, PassState, SiteRecord
from ..insert_qdq import add_branch, result_of
from .lorc import float_weight, products_of

aten = torch.ops.aten


@method("branches", "llm_int8")
class LLMInt8Section(Branch):
    """Input features with outliers go through a float path (LLM.int8(), arXiv 2208.07339).

    Attributes:
        threshold: features with a larger magnitude on calibration data are outliers.
    """

    threshold: float = Field(6.0, gt=0)
    stage: ClassVar[Stage] = Stage.SEPARATE
    calibrates: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [SeparateOutliers(plan, self.threshold)]


@dataclass(frozen=True)
class SeparateOutliers(GraphPass):
    """y = Q(x with zeros at the outliers) W_rounded + x[outliers] W[outliers], the second product in float.

    Runs before activations are quantized, so that neither an outlier nor the scale it would ask for reaches the
    quantized path. It may run before the weights are rounded or after. Before, the weight loses the columns that take
    the float path, as in LLM.int8(): they have no part in its scales, and a method that makes up for the rounding of
    one column in others (GPTQ) does not do it for these. After, they stay in the weight, multiplied by zero.

    LLM.int8() looks for outliers in every batch when the model runs. Here they are the features that exceed the
    threshold on calibration data, because ONNX Runtime's products need fixed shapes: a feature that first exceeds it
    later is quantized like any other.

    Attributes:
        plan: by linear name; linears whose scheme has no activation format are left alone.
        threshold: features whose largest magnitude is above it are outliers.
    """

    plan: Mapping[str, LinearPlan]
    threshold: float = 6.0
    reads_float_weights: ClassVar[bool] = True
    preserves_values: ClassVar[bool] = True

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        return dict.fromkeys(self._sites(module), ChannelAbsmax)

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for value, readers in self._sites(module).items():
            absmax = context.statistics[value].absmax()
            index = (absmax > self.threshold).nonzero().squeeze(1)
            names = list(readers)
            data = {"outliers": len(index), "features": len(absmax), "absmax": float(absmax.max()), "linears": names}
            if not len(index):
                result.skipped.append(SiteRecord(value.name, f"no feature above {self.threshold:g}", data))
                continue
            _separate(module, context.handover, value, readers, index)
            result.changed.append(SiteRecord(value.name, f"{len(index)} of {len(absmax)} features in float", data))
        finish(module)
        return result

    def _sites(self, module: GraphModule) -> dict[Node, dict[str, list[Node]]]:
        """By value, the nodes of each linear that will read it quantized: the linear itself, or its products."""
        found = {linear.name: [linear.node] for linear in linears(module.graph) if linear.name in self.plan}
        found |= products_of(module, self.plan)
        sites: dict[Node, dict[str, list[Node]]] = {}
        for name, nodes in found.items():
            scheme = self.plan[name].scheme
            if scheme is not None and scheme.activation is not None:
                sites.setdefault(operand(nodes[0]), {})[name] = nodes
        return sites


def _separate(
    module: GraphModule, handover: PassState, value: Node, readers: Mapping[str, list[Node]], index: torch.Tensor
) -> None:
    graph, first = module.graph, next(iter(readers))
    # A branch that corrects the rounded weight corrects it at the outliers too, where there is nothing to correct now.
    corrections = [node for node in value.users if node.meta.get(Meta.BRANCH_OF) in readers]
    quantized = [*corrections, *(node for nodes in readers.values() for node in nodes)]
    with graph.inserting_before(next(node for node in graph.nodes if node in quantized)):
        mask = torch.ones(size_at(value, -1), device=index.device).index_fill_(0, index, 0.0)
        kept = add_tensor(graph, f"{first}.outlier_mask", mask)
        masked = call(graph, aten.mul.Tensor, (value, kept), like=value)
        masked.meta[Meta.WITHOUT_OUTLIERS] = True
        columns = add_tensor(graph, f"{first}.outlier_index", index)
        shape = (*shape_of(value)[:-1], len(index))
        taken = call(graph, aten.index_select.default, (value, -1, columns), like=value, shape=shape)
    for node in quantized:
        node.replace_input_with(value, masked)
    if value in handover.formats:
        handover.formats[masked] = handover.formats[value]
    if value in handover.row_scales:
        handover.row_scales[masked] = handover.row_scales[value]
    for name, nodes in readers.items():
        weight = _float_columns(module, handover, name, nodes[0], index)
        with graph.inserting_before(result_of(module, name).next):
            constant = add_tensor(graph, f"{name}.outlier_weight", weight)
            shape = (*shape_of(taken)[:-1], weight.shape[1])
            branch = call(graph, aten.matmul.default, (taken, constant), like=taken, shape=shape)
        add_branch(module, name, branch)


def _float_columns(
    module: GraphModule, handover: PassState, name: str, node: Node, index: torch.Tensor
) -> torch.Tensor:
    """Rows of the transposed float weight at `index`; a weight that is still to be rounded loses them."""
    linear = linear_at(node)
    if linear is None:
        return float_weight(handover, name)[:, index].t().contiguous()
    weight = get_tensor(module, linear.weight)
    node.meta[Meta.RESULT_OF] = name
    set_tensor(module, linear.weight, weight.index_fill(1, index, 0.0))
    return weight[:, index].t().contiguous()
