"""The token embedding as codes in groups, and an output projection that reads the very same ones.

The embedding comes first, so it owns the codes, and the layers behind it are calibrated on its rounded rows. A tied
output projection takes codes and scales as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.edit import call, finish, get_tensor, is_call, owner_of, shape_of
from ..graph.sites import Linear, linears
from ..plan.linear_plan import LinearPlan, fit
from ..quant.affine import QuantizedWeight, quantize_weight
from ..quant.formats import Scheme, WeightFormat
from ..quant.packing import stored_block
from .base import Context, GraphPass, Note, PassResult
from .insert_qdq import insert_weight, weight_tensors

aten = torch.ops.aten
ops = torch.ops.qexport
Rounding = Callable[[torch.Tensor, WeightFormat], QuantizedWeight]
# What leaves the order of token ids as it is.
_SAME_IDS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.to.dtype, aten._to_copy.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingPlan:
    """The decision for one table of token embeddings.

    Attributes:
        name: its module path; block: the block it is in; weight: name of its tensor; shape: (tokens, features).
        scheme: how its codes are kept; None keeps it in float.
        reason: why the scheme differs from what was asked for, or why there is none; empty when as asked.
        linear: the output projection that reads the same codes; empty where there is none.
        bytes: of the table in the file.
    """

    name: str
    block: str
    weight: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""
    linear: str = ""
    bytes: int = 0


def token_embeddings(graph: Graph, ids: Node | None) -> list[Node]:
    """The lookups of rows by the token ids that the graph takes in, each with a constant table."""

    def source(node: Node) -> Node:
        while is_call(node, *_SAME_IDS):
            node = node.args[0]
        return node

    lookups = (n for n in graph.nodes if is_call(n, aten.embedding.default) and n.args[0].op == "get_attr")
    return [n for n in lookups if ids is not None and source(n.args[1]) is ids]


def plan_embeddings(
    graphs: Sequence[tuple[str, Graph, Node | None]],
    wanted: Scheme | None,
    tied: bool,
    plan: Sequence[LinearPlan],
    projection: Linear | None,
    method: str = "rtn",
    width: int = 4,
) -> tuple[list[EmbeddingPlan], list[LinearPlan]]:
    """Decide for every table of token embeddings.

    Args:
        graphs: (block name, graph, the placeholder of the token ids or None) in order.
        wanted: the scheme asked for; None for float.
        tied: read the codes of the output projection instead.
        plan: of the linears.
        projection: the output projection.
        method: how codes of linears are found; those that train weights do not apply to shared codes.
        width: bytes of a number that stays float.

    Returns:
        a plan for every table, and the linears' plans with the reason why one reads another's codes.
    """
    found: dict[str, EmbeddingPlan] = {}
    linear = next((p for p in plan if projection is not None and p.name == projection.name), None)
    for block, graph, ids in graphs:
        for node in token_embeddings(graph, ids):
            weight, shape = node.args[0].target, shape_of(node.args[0])
            empty = EmbeddingPlan(owner_of(weight), block, weight, shape, None)
            same = projection is not None and projection.weight == weight
            if tied:
                made = _tied(empty, linear if same else None)
            else:
                scheme, reason = fit(wanted, shape[1], whole=True)
                if scheme is not None and same and linear.scheme is None:
                    reason = f"{reason}; " if reason else ""
                    reason += f"{linear.name} keeps the same table in float, so the file holds it twice"
                made = replace(empty, scheme=scheme, reason=reason)
            found[weight] = replace(made, bytes=table_bytes(made, width))
    shared = {e.linear: e for e in found.values() if e.linear}
    return list(found.values()), [_sharing(p, shared[p.name], method) if p.name in shared else p for p in plan]


def _tied(empty: EmbeddingPlan, linear: LinearPlan | None) -> EmbeddingPlan:
    if linear is None:
        return replace(empty, reason="its table is not the weight of the output projection, so nothing can be shared")
    if linear.scheme is None:
        return replace(empty, reason=f"{linear.name}, which it is tied to, stays in float: {linear.reason}")
    if not linear.scheme.table:
        why = f"{linear.name}, which it is tied to, is {linear.scheme.name}: no codes in groups to look rows up in"
        return replace(empty, reason=why)
    scheme, reason = fit(linear.scheme, empty.shape[1], whole=True)
    return replace(empty, scheme=scheme, reason=reason, linear=linear.name if scheme else "")


def _sharing(plan: LinearPlan, embedding: EmbeddingPlan, method: str) -> LinearPlan:
    how = f", which are rounded to nearest: {method} does not apply"
    why = f"reads the codes of {embedding.name}{how if method.startswith('zq') else ''}"
    given = plan.reason or embedding.reason
    return replace(plan, scheme=embedding.scheme, reason=f"{given}; {why}" if given else why, bytes=0)


def table_bytes(plan: EmbeddingPlan, float_bytes: int = 4) -> int:
    """Bytes of the table in the file; float_bytes: of a number that stays float."""
    rows, features = plan.shape
    if plan.scheme is None:
        return rows * features * float_bytes
    bits = plan.scheme.weight.stored_bits
    blocks = features // stored_block(bits, plan.scheme.weight.group_size)
    zero_points = 0 if plan.scheme.weight.symmetric else -(-blocks * bits // 8)  # every row begins on its own byte
    return rows * (features * bits // 8 + blocks * float_bytes + zero_points)


@dataclass(frozen=True)
class QuantizeEmbedding(GraphPass):
    """embedding(table, ids) becomes gather_quantized(codes, scale, zero_point, ids).

    Attributes:
        plan: by name of the table's tensor; tables without a scheme stay as they are.
        rounding: from a table [V, K] and its format to codes and scales.
    """

    plan: Mapping[str, EmbeddingPlan]
    rounding: Rounding = quantize_weight
    keeps_values: ClassVar[bool] = True

    def works_on(self, module: GraphModule) -> bool:
        return bool(self._lookups(module.graph))

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result, graph = PassResult(), module.graph
        tables: dict[str, tuple[Node, Node, Node | None]] = {}
        for node in self._lookups(graph):
            plan = self.plan[node.args[0].target]
            fmt = plan.scheme.weight
            with graph.inserting_before(node):
                if plan.weight not in tables:
                    table = self.rounding(get_tensor(module, plan.weight), fmt)
                    tables[plan.weight] = weight_tensors(module, plan.name, table)
                    what = f"{plan.scheme.name}, shared with {plan.linear}" if plan.linear else plan.scheme.name
                    result.changed.append(Note(plan.name, what))
                arguments = (*tables[plan.weight], node.args[1], fmt.group_size, fmt.stored_bits)
                rows = call(graph, ops.gather_quantized.default, arguments, like=node)
            node.replace_all_uses_with(rows)
            graph.erase_node(node)
        finish(module)
        return result

    def _lookups(self, graph: Graph) -> list[Node]:
        nodes = (n for n in graph.nodes if is_call(n, aten.embedding.default) and n.args[0].op == "get_attr")
        return [n for n in nodes if (p := self.plan.get(n.args[0].target)) is not None and p.scheme is not None]


@dataclass(frozen=True)
class ShareEmbedding(GraphPass):
    """The tied output projection reads the embedding's codes. Runs first: no pass may change them any more.

    Attributes:
        plan: by the name of the linear, the embedding whose codes it reads.
    """

    plan: Mapping[str, EmbeddingPlan]
    keeps_values: ClassVar[bool] = True

    def works_on(self, module: GraphModule) -> bool:
        return any(linear.name in self.plan for linear in linears(module.graph))

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for linear in linears(module.graph):
            if linear.name not in self.plan:
                continue
            owner = self.plan[linear.name]
            context.handover.keep_weight(linear.name, get_tensor(module, linear.weight))
            tensors = {part: context.earlier(f"{owner.name}.weight_{part}") for part in ("codes", "scale")}
            if not owner.scheme.weight.symmetric:
                tensors["zero_point"] = context.earlier(f"{owner.name}.weight_zero_point")
            table = QuantizedWeight(
                tensors["codes"].t(), tensors["scale"].t(),
                tensors["zero_point"].t() if "zero_point" in tensors else None, owner.scheme.weight,
            )  # fmt: skip
            insert_weight(module, linear, table, shares=owner.name)
            result.changed.append(Note(linear.name, f"{owner.scheme.name}, the codes of {owner.name}"))
        finish(module)
        return result
