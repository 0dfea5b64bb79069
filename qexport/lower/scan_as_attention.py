"""Selective scans as linear attention, for providers where a loop of small operators takes longer than one kernel."""

from dataclasses import replace

import torch
from torch.fx import Graph, Node

from ..graph.edit import call, is_call, shape_of
from ..graph.meta import Meta
from ..graph.schema import bind
from ..graph.views import Item

aten, ops = torch.ops.aten, torch.ops.qexport


def scans_as_attention(graph: Graph) -> None:
    """A head for each channel, whose keys have a decay of their own, in place; the cache keeps its form."""
    for node in [n for n in graph.nodes if is_call(n, ops.selective_scan.default)]:
        given = bind(node)
        (batch, length, channels), states = shape_of(given.x), shape_of(given.a)[1]
        wide, flat = (batch, length, channels, states), (batch, length, channels, 1)
        with graph.inserting_before(node):

            def column(x: Node, axis: int, shape: tuple[int | str, ...]) -> Node:
                return call(graph, aten.unsqueeze.default, (x, axis), like=x, shape=shape)

            steps = column(given.dt, -1, flat)
            decay = call(graph, aten.mul.Tensor, (steps, given.a), like=steps, shape=wide)
            value = column(call(graph, aten.mul.Tensor, (given.x, given.dt), like=given.x), -1, flat)
            query, key = (column(x, 2, (batch, length, 1, states)) for x in (given.c, given.b))
            past = column(given.past, -1, (batch, channels, states, 1))
            arguments = (query, key, value, decay, past, 1.0)
            attention = graph.call_function(ops.gated_linear_attention.default, arguments)
            attention.meta = dict(node.meta)
            attention.meta[Meta.SPEC] = tuple(replace(spec, shape=(*spec.shape, 1)) for spec in node.meta[Meta.SPEC])
        for user in list(node.users):
            place = Item.of(user).index
            with graph.inserting_before(user):
                part = call(graph, user.target, (attention, place), like=user, shape=(*shape_of(user), 1))
                made = call(graph, aten.squeeze.dim, (part, -1), like=user)
            user.replace_all_uses_with(made)
            graph.erase_node(user)
        graph.erase_node(node)
