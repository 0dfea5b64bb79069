"""What of a graph has no ONNX form, all of it at once and before a weight is read."""

from collections.abc import Iterable

import onnx_ir as ir
import torch
from torch.fx import Graph, Node

from ..errors import LoweringError
from ..graph.meta import Meta
from . import ops as _ops  # noqa: F401  registers the translations
from .emitter import REMEDY, Emitter, place_of
from .operator_set import NATIVE, OperatorSet
from .registry import is_translated, translate, untranslated

_SHOWN = 12  # operators that an error names


def check_translations(graphs: Iterable[Graph]) -> None:
    """Find operators without an ONNX form before any work is done on a model.

    Raises:
        LoweringError: names all of them, why, and the line that each comes from.
    """
    calls = (node for graph in graphs for node in graph.nodes if node.op == "call_function")
    _refuse({node: untranslated(node) for node in calls if not is_translated(node.target)})


def check_forms(graphs: Iterable[Graph], operators: OperatorSet = NATIVE) -> None:
    """The same for calls too whose operator has a form that their arguments do not allow.

    Every call is translated into a graph that nobody keeps, without its tensors: of graphs that are translated as they
    are, not of those that lowering rewrites first.

    Args:
        operators: those that the file may be made of.
    """
    found: dict[Node, LoweringError] = {}
    for graph in graphs:
        emit = Emitter(operators)
        emit.enter("", _unread)
        for node in graph.nodes:
            if node.op == "placeholder":
                emit.values[node] = ir.Value(name=node.name)
            elif node.op == "call_function":
                try:
                    made = translate(emit, node)
                except LoweringError as error:
                    found[node] = error
                    made = _stand_in(node)
                (emit.results if isinstance(made, tuple) else emit.values)[node] = made  # type: ignore[assignment]
    _refuse(found)


def _unread(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is read though nothing is written")


def _stand_in(node: Node) -> ir.Value | tuple[ir.Value, ...]:
    """Values of the kind that a call would make."""
    spec = node.meta[Meta.SPEC]
    if isinstance(spec, tuple):
        return tuple(ir.Value(name=f"{node.name}:{place}") for place in range(len(spec)))
    return ir.Value(name=node.name)


def _refuse(found: dict[Node, LoweringError]) -> None:
    """Raise one error for all, each reason once and with the first line that has it."""
    if not found:
        return
    (first, error), *_ = found.items()
    reasons: dict[str, list[Node]] = {}
    for node, single in found.items():
        reasons.setdefault(single.message.removesuffix(node.meta.get(Meta.LINE, "")), []).append(node)
    if len(reasons) == 1 and len(found) == 1:
        raise error
    texts = []
    for reason, nodes in list(reasons.items())[:_SHOWN]:
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        texts.append(f"{reason}{nodes[0].meta.get(Meta.LINE, '')}{more}")
    rest = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise LoweringError("; ".join(texts) + rest, place=place_of(first), remedy=REMEDY)
