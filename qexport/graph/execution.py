"""Running a graph many times: what follows from its tensors alone is computed once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

_KEPT = 1 << 30  # bytes of what depends on no input


class Executor:
    """Runs a module on batch after batch, without gradients.

    What depends on no input, such as weights that are dequantized, is computed once and kept as long as this object, up
    to a GB: of the weights of larger blocks the rest is made for every batch again.

    Args:
        module: not changed while this object is in use; its tensors are loaded.
    """

    def __init__(self, module: GraphModule):
        self._interpreter, self._constants = Interpreter(module), _constants(module)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """What the module's forward returns."""
        with torch.no_grad():
            return self._interpreter.run(*inputs, initial_env=dict(self._constants))


def skipping(graph: Graph, wanted: Iterable[Node]) -> dict[Node, None]:
    """What to give an Interpreter as its first values so that it computes the wanted nodes and nothing beside them.

    The results of such a run are None. A block's last products, for example, have no part in what its linears read.
    """
    needed, waiting = set(), list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return {node: None for node in graph.nodes if node not in needed and node.op not in ("placeholder", "output")}


def _constants(module: GraphModule) -> dict[Node, Any]:
    """The values that nodes with inputs read and that follow from no input, by the node that makes them."""
    interpreter = Interpreter(module)
    found: dict[Node, Any] = {}
    fixed: set[Node] = set()
    made: dict[Node, int] = {}  # bytes of what is kept
    for node in module.graph.nodes:
        if not _is_fixed(node, fixed) or (node.op == "call_function" and sum(made.values()) >= _KEPT):
            continue
        fixed.add(node)
        interpreter.env = found
        with torch.no_grad():
            found[node] = interpreter.run_node(node)
        if node.op == "call_function" and isinstance(found[node], torch.Tensor):
            made[node] = found[node].nbytes
        for read in node.all_input_nodes:
            if all(user in fixed for user in read.users):
                found[read] = None  # of several steps that make one weight, only the last is kept
                made.pop(read, None)
    return found


def _is_fixed(node: Node, fixed: set[Node]) -> bool:
    """Whether a value follows from tensors of the module alone."""
    if node.op == "call_function":
        return bool(node.all_input_nodes) and fixed.issuperset(node.all_input_nodes)
    return node.op == "get_attr"
