"""Products with a weight on the left, of values whose features come before their tokens, as linears."""

import torch
from torch.fx import Graph

from ..graph.edit import is_call
from ..graph.meta import Meta
from ..graph.schema import bind

aten = torch.ops.aten


def turn_left_products(graph: Graph) -> None:
    """weight [n, k] @ x [batch, k, tokens] becomes linear(x^T, weight)^T, in place; x^T is often there already."""
    for node in list(graph.nodes):
        if not is_call(node, aten.matmul.default):
            continue
        weight, x = bind(node).self, bind(node).other
        if weight.op != "get_attr" or weight.meta["val"].dim() != 2 or x.meta["val"].dim() != 3:
            continue
        like: dict[str, str] = {Meta.MODULE_PATH: node.meta.get(Meta.MODULE_PATH, "")}
        with graph.inserting_before(node):
            rows = graph.call_function(aten.transpose.int, (x, 1, 2))
            product = graph.call_function(aten.linear.default, (rows, weight))
            turned = graph.call_function(aten.transpose.int, (product, 1, 2))
        for made, value in ((rows, x.meta["val"].transpose(1, 2)), (product, node.meta["val"].transpose(1, 2))):
            made.meta.update(like, val=value)
        product.meta |= {name: value for name, value in node.meta.items() if name != "val"}
        turned.meta = dict(node.meta)
        node.replace_all_uses_with(turned)
        graph.erase_node(node)
