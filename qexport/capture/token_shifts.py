"""Each token beside the one in front: padding whose place the last token of the past takes, as a concatenation."""

import operator
from functools import partial

import torch
from torch.fx import Graph, Node

from ..graph.edit import is_call
from ..graph.meta import Meta
from ..graph.schema import bind
from ..graph.views import operand

aten = torch.ops.aten
_BY_ONE = [0, 0, 1, -1]  # of [batch, tokens, features]: a row in front, and the last one gone


def join_shifts(graph: Graph) -> None:
    """y = pad(x, a row in front, the last one gone); y[:, 0].copy_(last) becomes y = cat(last, x[:, :-1]), in place."""
    for node in list(graph.nodes):
        if not is_call(node, aten.pad.default, aten.constant_pad_nd.default) or list(bind(node).pad) != _BY_ONE:
            continue
        copies = [copy for user in node.users if (copy := _copied_to_first(user)) is not None]
        if len(copies) != 1 or node.meta["val"].dim() != 3:
            continue
        copy, x = copies[0], operand(node)
        place, last, value = operand(copy), bind(copy).src, node.meta["val"]
        like: dict[str, str] = {Meta.MODULE_PATH: node.meta.get(Meta.MODULE_PATH, "")}
        with graph.inserting_after(copy):
            row = graph.call_function(aten.unsqueeze.default, (last, 1))
        with graph.inserting_after(row):
            rest = graph.call_function(aten.slice.Tensor, (x, 1, 0, -1))
        with graph.inserting_after(rest):
            joined = graph.call_function(aten.cat.default, ([row, rest], 1))
        for made, of in ((row, value[:, :1]), (rest, x.meta["val"][:, :-1]), (joined, value)):
            made.meta.update(like, val=of)
        node.replace_all_uses_with(joined, delete_user_cb=partial(operator.is_not, place))
        for dead in (copy, place, node):
            graph.erase_node(dead)


def _copied_to_first(place: Node) -> Node | None:
    """What writes into a value's first row, if nothing else is done with that."""
    if not is_call(place, aten.select.int) or (bind(place).dim, bind(place).index) != (1, 0) or len(place.users) != 1:
        return None
    copy = next(iter(place.users))
    written = is_call(copy, aten.copy_.default) and operand(copy) is place and not copy.users
    return copy if written else None
