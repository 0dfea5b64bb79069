"""Values that travel between blocks: adding one, reading one, dropping what nobody reads any more."""

from torch.fx import Graph, Node

from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.edit import TensorSpec, finish
from ..graph.meta import Meta
from ..graph.views import results_of


def producers(captured: CapturedModel) -> dict[str, tuple[Block, Node]]:
    """The block and the node that make each value which leaves a block."""
    found: dict[str, tuple[Block, Node]] = {}
    for block in captured.blocks:
        results = results_of(block.module.graph)
        found |= {name: (block, node) for name, node in zip(block.outputs, results, strict=True)}
    return found


def names_of(block: Block) -> dict[Node, str]:
    """The values that a block reads from outside, by placeholder."""
    placeholders = [n for n in block.module.graph.nodes if n.op == "placeholder"]
    return dict(zip(placeholders, block.inputs, strict=True))


def first_call(graph: Graph) -> Node:
    """The first node that is no placeholder."""
    first: Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first


def hand_on(block: Block, node: Node, name: str) -> None:
    """Make a value an output of a block."""
    output = block.module.graph.output_node()
    output.args = ((*results_of(block.module.graph), node),)
    block.outputs.append(name)


def read_in(block: Block, name: str, spec: TensorSpec) -> Node:
    """The placeholder of a value from outside, made where there is none."""
    for node, known in names_of(block).items():
        if known == name:
            return node
    graph = block.module.graph
    with graph.inserting_before(first_call(graph)):
        node = graph.placeholder(name.replace(".", "_"))
    node.meta = {Meta.SPEC: spec, Meta.MODULE_PATH: ""}
    block.inputs.append(name)
    return node


def prune(captured: CapturedModel) -> None:
    """Drop what nobody reads any more: nodes, inputs and outputs of blocks, inputs of the model."""
    wanted = {port.value for port in captured.outputs}
    for block in reversed(captured.blocks):
        graph = block.module.graph
        results = results_of(graph)
        kept = [i for i, name in enumerate(block.outputs) if name in wanted]
        graph.output_node().args = (tuple(results[i] for i in kept),)
        block.outputs[:] = [block.outputs[i] for i in kept]
        finish(block.module)
        for node, name in names_of(block).items():
            if not node.users:
                block.inputs.remove(name)
                graph.erase_node(node)
        block.module.recompile()
        wanted |= set(block.inputs)
    captured.inputs[:] = [port for port in captured.inputs if port.value in wanted]
