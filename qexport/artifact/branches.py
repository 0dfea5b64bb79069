"""Files that have the stack of blocks twice: for prompts and for steps. See lower/prefill_twin.py.

Nodes and values in a branch are called what they would be in a file without branches, behind the branch's prefix.
"""

from collections.abc import Iterator

import onnx
from onnx import AttributeProto

LAYERS = "layers"  # name of the If
PROMPTS, STEPS = "prompts/", "steps/"  # prefixes: its then-branch and its else-branch
_BRANCH = {PROMPTS: "then_branch", STEPS: "else_branch"}


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its branches; those for steps go by the names of a file without branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from (_renamed(inner, STEPS) for inner in attribute.g.node)


def only(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """The model with one of its branches in the place of both, in its names; a model without branches as it is.

    Args:
        prefix: PROMPTS or STEPS.
    """
    graph = model.graph
    place = next((i for i, node in enumerate(graph.node) if node.op_type == "If" and node.name == LAYERS), None)
    if place is None:
        return model
    branch = next(a.g for a in graph.node[place].attribute if a.name == _BRANCH[prefix])
    nodes = [*graph.node[:place], *(_renamed(node, prefix) for node in branch.node), *graph.node[place + 1 :]]
    chosen = onnx.ModelProto()
    chosen.CopyFrom(model)
    del chosen.graph.node[:]
    chosen.graph.node.extend(nodes)
    return chosen


def _renamed(node: onnx.NodeProto, prefix: str) -> onnx.NodeProto:
    renamed = onnx.NodeProto()
    renamed.CopyFrom(node)
    renamed.name = node.name.removeprefix(prefix)
    renamed.input[:] = [name.removeprefix(prefix) for name in node.input]
    renamed.output[:] = [name.removeprefix(prefix) for name in node.output]
    return renamed
