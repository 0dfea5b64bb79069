"""Indexers: they keep one key for every token, and choose by it what attention reads (arXiv 2512.02556).

A query attends to the keys of the highest scores, whose number is stated; to all in a shorter text.
"""

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.edit import is_call
from ..graph.schema import bind
from ..graph.views import Item
from .recurrences.registry import stands_for_forward
from .stand_ins import standing_in

aten, ops = torch.ops.aten, torch.ops.qexport


@stands_for_forward(
    "DeepseekV32Indexer", "GlmMoeDsaIndexer", "AXK2Indexer", "Dots3NoteTextIndexer", "HYV4Indexer"
)  # fmt: skip
def _for_any_length(indexer, path, *args, **kwargs):
    """The module's own forward, in which the smaller of two numbers may depend on the length of a text.

    Python's min compares them, so that the graph would be one for texts as short or as long as the example.
    """
    with standing_in("min", torch.sym_min, [type(indexer).__module__]):
        return type(indexer).forward(indexer, *args, **kwargs)


def fuse_choices(graph: Graph) -> None:
    """Replace topk(x, min(count, length of x)) by `highest`, in place, where places alone are read."""
    for node in list(graph.nodes):
        if not is_call(node, aten.topk.default) or not isinstance(k := bind(node).k, Node):
            continue
        given = bind(node)
        value, parts = given.self.meta["val"], [Item.match(user) for user in node.users]
        counts = [number for number in k.args if isinstance(number, int)]
        last = given.largest and given.dim in (-1, value.dim() - 1)
        if not last or len(counts) != 1 or any(part is None or part.index != 1 for part in parts):
            continue
        if not statically_known_true(k.meta["val"] == torch.sym_min(counts[0], value.shape[-1])):
            continue
        with graph.inserting_before(node):
            places = graph.call_function(ops.highest.default, (given.self, counts[0]))
        for user in list(node.users):
            places.meta = dict(user.meta)
            user.replace_all_uses_with(places)
            graph.erase_node(user)
        graph.erase_node(node)
