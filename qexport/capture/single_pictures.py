"""Convolutions of a picture without a batch in front, which ONNX does not know, as those of a batch of one."""

import torch
from torch.fx import Graph, Node

from ..graph.convolution_sites import CONVOLUTIONS

aten = torch.ops.aten
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_ALL = frozenset({*CONVOLUTIONS, aten.conv1d.padding, aten.conv2d.padding, *_TRANSPOSED})


def batch_single_pictures(graph: Graph) -> None:
    """Put a batch in front of what such convolutions read, and take it off what they make."""
    for node in list(graph.nodes):
        if node.target not in _ALL:
            continue
        picture, weight, *others = node.args
        if not isinstance(picture, Node) or picture.meta["val"].dim() != weight.meta["val"].dim() - 1:
            continue
        with graph.inserting_before(node):
            rows = graph.call_function(aten.unsqueeze.default, (picture, 0))
        rows.meta = {**picture.meta, "val": picture.meta["val"].unsqueeze(0)}
        node.args = (rows, weight, *others)
        with graph.inserting_after(node):
            alone = graph.call_function(aten.squeeze.dim, (node, 0))
        node.replace_all_uses_with(alone, delete_user_cb=lambda user, alone=alone: user is not alone)
        alone.meta = dict(node.meta)
        node.meta = {**node.meta, "val": node.meta["val"].unsqueeze(0)}
