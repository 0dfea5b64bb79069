"""What every table of token embeddings becomes, decided from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from ..graph.edit import is_call, owner_of
from ..graph.sites import Linear
from ..graph.views import Embedding, operand, sizes_of, tensor_name
from ..quant.formats import Scheme
from .linear_plan import LinearPlan, Planned, fit

aten = torch.ops.aten


# What leaves the order of token ids as it is.
_SAME_IDS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.to.dtype, aten._to_copy.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingPlan(Planned):
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
            node = operand(node)
        return node

    lookups = ((node, found) for node in graph.nodes if (found := Embedding.match(node)) is not None)
    constant = [(node, found) for node, found in lookups if found.table.op == "get_attr"]
    return [node for node, found in constant if ids is not None and source(found.ids) is ids]


def plan_embeddings(
    graphs: Sequence[tuple[str, Graph, Node | None]],
    wanted: Scheme | None,
    tied: bool,
    plan: Sequence[LinearPlan],
    projection: Linear | None,
    idle: str = "",
    float_itemsize: int = 4,
) -> tuple[list[EmbeddingPlan], list[LinearPlan]]:
    """Decide for every table of token embeddings.

    Args:
        graphs: (block name, graph, the placeholder of the token ids or None) in order.
        wanted: the scheme asked for; None for float.
        tied: read the codes of the output projection instead.
        plan: of the linears.
        projection: the output projection.
        idle: the method that finds codes of linears, where it does not apply to tables; empty where it does.
        float_itemsize: bytes of a number that stays float.

    Returns:
        a plan for every table, and the linears' plans with the reason why one reads another's codes.
    """
    found: dict[str, EmbeddingPlan] = {}
    linear = next((p for p in plan if projection is not None and p.name == projection.name), None)
    for block, graph, ids in graphs:
        for node in token_embeddings(graph, ids):
            table = Embedding.of(node).table
            weight, (rows, features) = tensor_name(table), sizes_of(table)
            empty = EmbeddingPlan(owner_of(weight), block, weight, (rows, features), None)
            same = projection is not None and projection.weight == weight
            if tied:
                made = _tied(empty, linear if same else None)
            else:
                scheme, reason = fit(wanted, features, whole=True)
                if scheme is not None and same and linear is not None and linear.scheme is None:
                    reason = f"{reason}; " if reason else ""
                    reason += f"{linear.name} keeps the same table in float, so the file holds it twice"
                if scheme is None and same and linear is not None and linear.scheme is not None:
                    reason = (
                        f"{linear.name} reads the same table as {linear.scheme.name}, so the file holds it twice and "
                        "grows: embedding: tied or auto shares the codes"
                    )
                made = replace(empty, scheme=scheme, reason=reason)
            found[weight] = replace(made, bytes=table_bytes(made, float_itemsize))
    shared = {e.linear: e for e in found.values() if e.linear}
    return list(found.values()), [_sharing(p, shared[p.name], idle) if p.name in shared else p for p in plan]


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


def _sharing(plan: LinearPlan, embedding: EmbeddingPlan, idle: str) -> LinearPlan:
    how = f", which are rounded to nearest: {idle} does not apply" if idle else ""
    why = f"reads the codes of {embedding.name}{how}"
    given = plan.reason or embedding.reason
    return replace(plan, scheme=embedding.scheme, reason=f"{given}; {why}" if given else why, bytes=0)


def table_bytes(plan: EmbeddingPlan, float_bytes: int = 4) -> int:
    """Bytes of the table in the file; float_bytes: of a number that stays float."""
    rows, features = plan.shape
    if plan.scheme is None:
        return rows * features * float_bytes
    return plan.scheme.bytes(plan.shape, float_bytes)
