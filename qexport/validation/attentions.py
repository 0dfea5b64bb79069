"""Where the attentions of a block are, by dataflow: the linear that reads one, and those that feed it."""

from os.path import commonprefix

import torch
from torch.fx import Graph, Node

from ..graph.edit import is_call
from ..graph.meta import Meta
from ..graph.sites import SHAPE_ONLY, linear_at, linears
from ..graph.views import AnyAttention, Item, operand

aten = torch.ops.aten
_RESHAPED = (*SHAPE_ONLY, aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default)


def attention_results(graph: Graph) -> dict[str, str]:
    """The path of the module of every attention, by the name of the linear that reads what comes out of it."""
    return {
        linear.name: _path(attention, linear.name)
        for linear in linears(graph)
        if (attention := _attention_behind(linear.input)) is not None
    }


def _attention_behind(value: Node) -> Node | None:
    """The attention whose output, only reshaped, is `value`."""
    while is_call(value, *_RESHAPED):
        value = operand(value)
    if (item := Item.match(value)) is not None and item.index == 0:
        return item.source if is_call(item.source, torch.ops.qexport.cached_attention.default) else None
    return value if is_call(value, aten.scaled_dot_product_attention.default) else None


def _path(attention: Node, reader: str) -> str:
    """What the names of the linears around an attention have in common; where that is nothing, where it is called."""
    found = AnyAttention.of(attention)
    names, waiting, met = [reader], [found.query, found.key, found.value], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in met:
            continue
        met.add(node)
        if (linear := linear_at(node)) is not None:
            names.append(linear.name)
        else:
            waiting += node.all_input_nodes
    shared = commonprefix([name.split(".")[:-1] for name in names])
    return ".".join(shared) or attention.meta.get(Meta.MODULE_PATH) or reader
