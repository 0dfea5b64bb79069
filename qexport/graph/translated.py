"""Which operators have an ONNX form, for those that work on a graph before it is lowered.

Translations register themselves when `qexport.lower` is imported, which lies above most of the package. Where nobody
has imported it, nothing is known to be without a form.
"""

from typing import Any

from torch.fx import Graph, Node

TRANSLATED: set[Any] = set()


def without_form(graph: Graph) -> list[Node]:
    """Calls of operators that have no ONNX form, in order; none where nothing that lowers is imported."""
    if not TRANSLATED:
        return []
    return [node for node in graph.nodes if node.op == "call_function" and node.target not in TRANSLATED]
