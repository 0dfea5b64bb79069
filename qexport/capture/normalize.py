"""A traced graph brought into the form that passes and the lowering expect.

No-ops of inference disappear; root-mean-square norms and rotary embeddings, which PyTorch traces as a handful of
elementwise nodes, become one node each; sizes are read from a tensor beside their use, so that a block needs no
integers from outside. Everything is recognised by what is computed, not by what the module is called.
"""

import operator
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.edit import is_call
from ..graph.meta import Meta
from ..graph.schema import bind
from ..graph.views import (
    END,
    Add,
    Cat,
    Gather,
    Index,
    Mul,
    Operand,
    Repeat,
    Reshape,
    Shaped,
    Slice,
    Unsqueeze,
    operand,
)  # fmt: skip
from .clips import spell_clips
from .copies_to_concat import join_parts
from .left_products import turn_left_products
from .odd_forms import leave_out_nothing, multiply_by_vectors
from .positions import slice_tables
from .single_pictures import batch_single_pictures
from .token_shifts import join_shifts

aten = torch.ops.aten
_IN_MEMORY = frozenset({"layout", "memory_format", "pin_memory"})
_NEAR = 64  # nodes among which a size is looked for

_IDENTITY = {
    aten.detach.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.dropout.default,
    aten.feature_dropout.default, aten.lift_fresh_copy.default,
}  # fmt: skip
_CAST = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
_ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
# Work on each row of features by itself.
_ROWWISE = {
    aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.relu.default, aten.gelu.default,
    aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.add.Tensor, aten.mul.Tensor,
}  # fmt: skip
# What they return may share the memory of what they are given.
_ALIASES = {
    *Shaped.targets, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.t.default, aten.detach.default, aten.alias.default,
}  # fmt: skip


def to_normal_form(module: GraphModule) -> GraphModule:
    """Normalize the graph of `module` in place, keeping what it computes to rounding, and return it.

    The module's code is not regenerated: what runs are the blocks that the graph is cut into.
    """
    graph = module.graph
    _forget_layouts(graph)
    join_parts(graph)
    batch_single_pictures(graph)
    _leave_inputs_alone(graph)
    _compute_in_float32(graph)
    _drop_identities(graph)
    join_shifts(graph)
    spell_clips(module)
    _fuse_lookups(graph)
    turn_left_products(graph)
    multiply_by_vectors(graph)
    leave_out_nothing(graph)
    _drop_round_trips(graph)
    _keep_rows_apart(graph)
    slice_tables(graph)
    _local_sizes(graph)
    _fuse_rms_norms(graph)
    _fuse_rotary(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return module


def _forget_layouts(graph: Graph) -> None:
    """How a tensor lies in memory, which a graph does not say."""
    for node in graph.nodes:
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in _IN_MEMORY}


def _leave_inputs_alone(graph: Graph) -> None:
    """Operators that work in place become those that return a new value.

    They stay where the old value, or one that shares its memory, is read afterwards; those have no ONNX translation.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node, place in order.items():
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        name = target._schema.name.removeprefix("aten::").removesuffix("_")
        new = getattr(getattr(aten, name, None), target._overloadname, None)
        shared = [operand(node)]
        while is_call(shared[-1], *_ALIASES):
            shared.append(operand(shared[-1]))
        if new is not None and all(order[user] <= place for value in shared for user in value.users):
            node.target = new


def _compute_in_float32(graph: Graph) -> None:
    """Arithmetic in bfloat16 that the model's code asks for: what kernels do, which is to compute wider and round."""
    for node in list(graph.nodes):
        if not is_call(node, *_ARITHMETIC) or node.meta["val"].dtype != torch.bfloat16:
            continue
        like: dict[str, Any] = {Meta.MODULE_PATH: node.meta.get(Meta.MODULE_PATH, "")}
        with graph.inserting_before(node):
            for value in node.all_input_nodes:
                if isinstance(value.meta["val"], torch.Tensor) and value.meta["val"].is_floating_point():
                    wide = graph.call_function(aten.to.dtype, (value, torch.float32))
                    wide.meta = {**like, "val": value.meta["val"].to(torch.float32)}
                    node.replace_input_with(value, wide)
        with graph.inserting_after(node):
            narrow = graph.call_function(aten.to.dtype, (node, torch.bfloat16))
        narrow.meta = {**like, "val": node.meta["val"]}
        node.replace_all_uses_with(narrow, delete_user_cb=partial(operator.is_not, narrow))
        node.meta = {**node.meta, "val": node.meta["val"].to(torch.float32)}


def _fuse_lookups(graph: Graph) -> None:
    """Rows of a table taken by index become embedding(table, ids), whether indexed or gathered from copies of it."""
    for node in list(graph.nodes):
        found = _match_gather(node)
        taken = Index.match(node)
        if taken is not None and len(taken.indices) == 1 and taken.x.meta["val"].dim() == 2:
            found = None if taken.indices[0] is None else (taken.x, taken.indices[0])
        if found is None or found[1].meta["val"].dtype != torch.int64:
            continue
        with graph.inserting_before(node):
            rows = graph.call_function(aten.embedding.default, found)
        rows.meta = dict(node.meta)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)


def _match_gather(node: Node) -> tuple[Node, Node] | None:
    """(table, ids) when node is gather(table.repeat(batch, 1, 1), 1, ids.unsqueeze(-1).repeat(1, 1, width))."""
    if (taken := Gather.match(node)) is None or taken.dim != 1:
        return None
    tables, places = Repeat.match(taken.x), Repeat.match(taken.index)
    column = None if places is None else Unsqueeze.match(places.x)
    if tables is None or places is None or column is None or column.dim not in (2, -1):
        return None
    table, ids, copies = tables.x, column.x, tables.repeats
    width = table.meta["val"].shape[-1]
    if table.meta["val"].dim() != 2:
        return None
    same = isinstance(copies[0], Node) and statically_known_true(copies[0].meta["val"] == ids.meta["val"].shape[0])
    plain = list(copies[1:]) == [1, 1] and list(places.repeats) == [1, 1, width]
    return (table, ids) if same and plain else None


def _drop_identities(graph: Graph) -> None:
    for node in list(graph.nodes):
        if is_call(
            node,
            aten._assert_tensor_metadata.default,
            aten._assert_scalar.default,
            aten.sym_constrain_range_for_size.default,
        ):
            graph.erase_node(node)
            continue
        same = (
            is_call(node, *_IDENTITY)
            or (is_call(node, *_CAST) and node.meta["val"].dtype == operand(node).meta["val"].dtype)
            or ((product := Mul.match(node)) is not None and product.other == 1.0)
            or _takes_all(node)
            or _keeps_shape(node)
        )
        if same:
            if is_call(node, aten.contiguous.default, aten.clone.default):
                for user in node.users:  # whose strides allowed a view
                    user.target = aten.reshape.default if is_call(user, aten.view.default) else user.target
            node.replace_all_uses_with(operand(node))
            graph.erase_node(node)


def _drop_round_trips(graph: Graph) -> None:
    """A view of a view that has the first one's shape again."""
    for node in list(graph.nodes):
        if not is_call(node, *Reshape.targets):
            continue
        source, shape = operand(node), node.meta["val"].shape
        while is_call(source, *Reshape.targets):
            source = operand(source)
            before = source.meta["val"].shape
            if len(before) == len(shape) and all(map(statically_known_true, map(operator.eq, before, shape))):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                break


def _keeps_shape(node: Node) -> bool:
    """view(x, [n, -1]) of an x of two axes whose first has n elements: where all sizes but one stay, that one does."""
    if (reshaped := Reshape.match(node)) is None:
        return False
    before, after = reshaped.x.meta["val"].shape, reshaped.shape
    if len(before) != len(after):
        return False
    sizes = [size.meta["val"] if isinstance(size, Node) else size for size in after]
    return sum(not statically_known_true(old == new) for old, new in zip(before, sizes, strict=True)) <= 1


def _takes_all(node: Node) -> bool:
    """x[:, 0:], written as a slice from 0 to the largest integer."""
    cut = Slice.match(node)
    return cut is not None and cut.bounds == (0, END) and cut.step == 1


def _keep_rows_apart(graph: Graph) -> None:
    """[batch, sequence, n] -> [batch * sequence, n] -> row by row -> [batch, sequence, m] without the two reshapes.

    Statistics tell padding by batch and position, and ONNX Runtime turns two-dimensional products into another operator
    than the one that is planned.
    """
    for start in list(graph.nodes):
        if not is_call(start, *Shaped.targets) or start.meta["val"].dim() != 2:
            continue
        source = operand(start)
        lead, width = source.meta["val"].shape[:-1], source.meta["val"].shape[-1]
        if len(lead) != 2 or not statically_known_true(start.meta["val"].shape[1] == width):
            continue
        flat = _rowwise_users(start, lead)
        if flat is None:
            continue
        for node in flat:
            if is_call(node, *Shaped.targets):
                node.replace_all_uses_with(source if node is start else operand(node))
            else:
                value = node.meta["val"]
                node.meta = {**node.meta, "val": value.new_empty((*lead, *value.shape[1:]))}
        for node in reversed(flat):
            if is_call(node, *Shaped.targets):
                graph.erase_node(node)


def _rowwise_users(start: Node, lead: Sequence[Any]) -> list[Node] | None:
    """Nodes between `start` and the views that restore `lead`, both included, in order; None if there are others."""
    inside: list[Node] = [start]
    ends: list[Node] = []
    for node in inside:  # grows while it is walked
        for user in node.users:
            if user in inside or user in ends:
                continue
            if not isinstance(user.meta.get("val"), torch.Tensor):  # sizes, and the output of the graph
                return None
            shape = user.meta["val"].shape
            if is_call(user, *Shaped.targets):
                restored = (*lead, node.meta["val"].shape[1])
                if len(shape) != 3 or not all(map(statically_known_true, map(operator.eq, shape, restored))):
                    return None
                ends.append(user)
            elif is_call(user, *_ROWWISE) and len(shape) == 2:
                inside.append(user)
            else:
                return None
    for node in inside[1:]:
        outside = [a for a in node.all_input_nodes if a not in inside]
        elementwise = is_call(node, aten.add.Tensor, aten.mul.Tensor)
        if any(a.op != "get_attr" or (elementwise and a.meta["val"].dim() > 1) for a in outside):
            return None
    order = {node: i for i, node in enumerate(start.graph.nodes)}
    return sorted([*inside, *ends], key=order.__getitem__) if ends else None


def _local_sizes(graph: Graph) -> None:
    """view(x, [n, ...]) with n the size of x, or of what x is made of: read n from there."""
    for node in list(graph.nodes):
        if (shaped := Shaped.match(node)) is None:
            continue
        source, shape = shaped.x, list(shaped.shape)
        for axis, size in enumerate(shape):
            if isinstance(size, Node) and (found := _measured(source, axis, size.meta["val"])):
                with graph.inserting_before(node):
                    local = graph.call_function(aten.sym_size.int, found)
                    local.meta = {**size.meta, Meta.MODULE_PATH: node.meta.get(Meta.MODULE_PATH, "")}
                shape[axis] = local
        node.args = (source, shape, *node.args[2:])


def _measured(source: Node, axis: int, size: Any) -> tuple[Node, int] | None:
    """The tensor nearest to a view's source, and its axis, that has this size; the same axis of the source first."""
    seen, waiting = {source}, deque([source])
    while waiting and len(seen) < _NEAR:
        node = waiting.popleft()
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and node.op != "get_attr":
            order = sorted(range(value.dim()), key=lambda at: at != axis)
            for at in order:
                if statically_known_true(value.shape[at] == size):
                    return node, at
        if isinstance(value, (torch.Tensor, tuple, list)):
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
    return None


def _fuse_rms_norms(graph: Graph) -> None:
    """weight * (x * rsqrt(mean(x^2, -1) + eps)) becomes rms_norm(x, [n], weight, eps)."""
    for root in list(graph.nodes):
        match = _match_rms_norm(root)
        if match is None:
            continue
        x, eps, product = match
        scaled = next(iter(product.users))
        if len(product.users) != 1 or (gained := Mul.match(scaled)) is None:
            continue
        weight = gained.other if gained.x is product else gained.x
        if not isinstance(weight, Node) or weight.meta["val"].dim() != 1:
            continue
        with graph.inserting_before(scaled):
            norm = graph.call_function(aten.rms_norm.default, (x, [weight.meta["val"].shape[0]], weight, eps))
        norm.meta = dict(scaled.meta)
        scaled.replace_all_uses_with(norm)
        for dead in (scaled, product):
            graph.erase_node(dead)


def _match_rms_norm(root: Node) -> tuple[Node, float, Node] | None:
    """(x, eps, x * rsqrt(...)) when root is the rsqrt of a root-mean-square norm over the last axis."""
    if not is_call(root, aten.rsqrt.default) or len(root.users) != 1:
        return None
    shifted = Add.match(operand(root))
    if shifted is None or not isinstance(shifted.other, float) or not is_call(shifted.x, aten.mean.dim):
        return None
    mean = bind(shifted.x)
    if list(mean.dim or ()) != [-1] or not is_call(mean.self, aten.pow.Tensor_Scalar):
        return None
    square = bind(mean.self)
    node = next(iter(root.users))
    product = Mul.match(node)
    if square.exponent != 2 or product is None or set(product.operands) != {square.self, root}:
        return None
    return square.self, shifted.other, node


def _fuse_rotary(graph: Graph) -> None:
    """x * cos + cat(-x2, x1) * sin becomes rotary_embedding(x, cos, sin) with half-width tables."""
    halves: dict[Node, Node] = {}
    for node in list(graph.nodes):
        match = _match_rotary(node)
        if match is None:
            continue
        x, cos, sin = match
        half_cos, half_sin = (_half_table(graph, table, halves) for table in (cos, sin))
        if half_cos is None or half_sin is None:
            continue
        with graph.inserting_before(node):
            rotated = graph.call_function(torch.ops.qexport.rotary_embedding.default, (x, half_cos, half_sin))
        rotated.meta = dict(node.meta)
        node.replace_all_uses_with(rotated)
        graph.erase_node(node)


def _match_rotary(node: Node) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) when node rotates x [batch, heads, sequence, d] by tables [batch, 1, sequence, d]."""
    if (total := Add.match(node)) is None:
        return None
    for straight, turned in (total.operands, total.operands[::-1]):
        if (found := _rotation(straight, turned)) is not None:
            return found
    return None


def _rotation(straight: Operand, turned: Operand) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) of x * cos and cat(-x2, x1) * sin."""
    plain, crossed = Mul.match(straight), Mul.match(turned)
    if plain is None or crossed is None or not isinstance(straight, Node) or straight.meta["val"].dim() != 4:
        return None
    halves, sin = crossed.operands if is_call(crossed.x, *Cat.targets) else crossed.operands[::-1]
    joined = Cat.match(halves)
    if joined is None or len(joined.tensors) != 2 or not is_call(joined.tensors[0], aten.neg.default):
        return None
    first, second = Slice.match(joined.tensors[1]), Slice.match(operand(joined.tensors[0]))
    if first is None or second is None or second.x is not first.x:
        return None
    x = first.x
    half = x.meta["val"].shape[-1] // 2
    if not {first.dim, second.dim} <= {3, -1} or first.bounds != (0, half) or second.bounds[0] != half:
        return None
    cos = plain.other if plain.x is x else plain.x
    if x not in plain.operands or not isinstance(cos, Node) or not isinstance(sin, Node):
        return None
    return x, cos, sin


def _half_table(graph: Graph, table: Node, halves: dict[Node, Node]) -> Node | None:
    """The [batch, sequence, d/2] half of a table unsqueeze(scale * cos(cat(f, f)), 1), or None for another form."""
    if (wide := Unsqueeze.match(table)) is None or wide.dim not in (1, -3):
        return None
    source = wide.x
    if source in halves:
        return halves[source]
    at = source
    while (scaled := Mul.match(at)) is not None and not isinstance(scaled.other, Node):
        at = scaled.x
    joined = Cat.match(operand(at)) if is_call(at, aten.cos.default, aten.sin.default) else None
    if joined is None or len(joined.tensors) != 2 or joined.tensors[0] is not joined.tensors[1]:
        return None
    half = source.meta["val"].shape[-1] // 2
    with graph.inserting_after(source):
        node = graph.call_function(aten.slice.Tensor, (source, 2, 0, half))
    node.meta = {**source.meta, "val": source.meta["val"][..., :half]}
    halves[source] = node
    return node
