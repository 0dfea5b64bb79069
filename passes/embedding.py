"""The token embedding as codes in groups, and an output projection that reads the very same ones.

The embedding comes first, so it owns the codes, and the layers behind it are calibrated on its rounded rows. A tied
output projection takes codes and scales as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.edit import call, finish, get_tensor
from ..graph.sites import linears
from ..graph.views import Embedding, tensor_name
from ..plan.embedding_plan import EmbeddingPlan
from ..quant.formats import QuantizedWeight, WeightFormat
from .base import Context, GraphPass, PassResult, SiteRecord
from .formats.integer import weight_tensors
from .insert_qdq import insert_weight

aten = torch.ops.aten
ops = torch.ops.qexport
Rounding = Callable[[str, torch.Tensor, WeightFormat], QuantizedWeight]


def _nearest(name: str, table: torch.Tensor, fmt: WeightFormat) -> QuantizedWeight:
    return fmt.round_to_nearest(table)


@dataclass(frozen=True)
class QuantizeEmbedding(GraphPass):
    """embedding(table, ids) becomes gather_quantized(codes, scale, zero_point, ids).

    Attributes:
        plan: by name of the table's tensor; tables without a scheme stay as they are.
        rounding: from the name of a table's tensor, the table [V, K] and its format to codes and scales.
    """

    plan: Mapping[str, EmbeddingPlan]
    rounding: Rounding = _nearest
    preserves_values: ClassVar[bool] = True

    def applies_to(self, module: GraphModule) -> bool:
        return bool(self._lookups(module.graph))

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result, graph = PassResult(), module.graph
        tables: dict[str, tuple[Node, Node, Node | None]] = {}
        for node in self._lookups(graph):
            found = Embedding.of(node)
            plan = self.plan[tensor_name(found.table)]
            fmt = plan.chosen.weight
            with graph.inserting_before(node):
                if plan.weight not in tables:
                    table = self.rounding(plan.weight, get_tensor(module, plan.weight), fmt)
                    tables[plan.weight] = weight_tensors(module, plan.name, table)
                    what = f"{plan.chosen.name}, shared with {plan.linear}" if plan.linear else plan.chosen.name
                    result.changed.append(SiteRecord(plan.name, what))
                arguments = (*tables[plan.weight], found.ids, fmt.group_size, fmt.stored_bits)
                rows = call(graph, ops.gather_quantized.default, arguments, like=node)
            node.replace_all_uses_with(rows)
            graph.erase_node(node)
        finish(module)
        return result

    def _lookups(self, graph: Graph) -> list[Node]:
        planned = {plan.weight for plan in self.plan.values() if plan.scheme is not None}
        lookups = ((node, found.table) for node in graph.nodes if (found := Embedding.match(node)) is not None)
        return [node for node, table in lookups if table.op == "get_attr" and tensor_name(table) in planned]


@dataclass(frozen=True)
class ShareEmbedding(GraphPass):
    """The tied output projection reads the embedding's codes. Runs first: no pass may change them any more.

    Attributes:
        plan: by the name of the linear, the embedding whose codes it reads.
    """

    plan: Mapping[str, EmbeddingPlan]
    preserves_values: ClassVar[bool] = True

    def applies_to(self, module: GraphModule) -> bool:
        return any(linear.name in self.plan for linear in linears(module.graph))

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for linear in linears(module.graph):
            if linear.name not in self.plan:
                continue
            owner = self.plan[linear.name]
            context.handover.keep_weight(linear.name, get_tensor(module, linear.weight))
            tensors = {part: context.earlier(f"{owner.name}.weight_{part}") for part in ("codes", "scale")}
            if owner.chosen.weight.has_zero_points:
                tensors["zero_point"] = context.earlier(f"{owner.name}.weight_zero_point")
            table = QuantizedWeight(
                tensors["codes"].t(), tensors["scale"].t(),
                tensors["zero_point"].t() if "zero_point" in tensors else None, owner.chosen.weight,
            )  # fmt: skip
            insert_weight(module, linear, table, shares=owner.name)
            result.changed.append(SiteRecord(linear.name, f"{owner.chosen.name}, the codes of {owner.name}"))
        finish(module)
        return result
