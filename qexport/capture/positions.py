"""Rows of a table that stand one behind another, taken as a slice.

Positions are ranges from the number of cached tokens on. ONNX Runtime makes a slice of a table's rows in a range too,
but under the CUDA provider it copies the ends of the range to the GPU and back.
"""

import torch
from torch.fx import Graph

from ..graph.edit import is_call
from ..graph.schema import bind
from ..graph.views import Embedding

aten = torch.ops.aten


def slice_tables(graph: Graph) -> None:
    """Write embedding(table, range(start, end)) as table[start:end], in place."""
    for node in list(graph.nodes):
        lookup = Embedding.match(node)
        if lookup is not None and is_call(lookup.ids, aten.arange.start):
            places = bind(lookup.ids)
            with graph.inserting_before(node):
                rows = graph.call_function(aten.slice.Tensor, (lookup.table, 0, places.start, places.end))
            rows.meta = dict(node.meta)
            node.replace_all_uses_with(rows)
            graph.erase_node(node)
