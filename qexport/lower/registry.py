"""Which function translates which operator: each is registered once, where it is written."""

from collections.abc import Callable
from typing import Any, TypeVar

import onnx_ir as ir
from torch.fx import Node

from ..errors import LoweringError
from ..graph.schema import Arguments, bind
from .emitter import Emitter, unsupported

# The emitter, the node, and its arguments by name; returns the ONNX value, or a tuple where the operator makes several.
Translated = ir.Value | tuple[ir.Value, ...]
Translation = Callable[[Emitter, Node, Arguments], Translated]
_T = TypeVar("_T", bound=Translation)

_TRANSLATIONS: dict[Any, Translation] = {}


def translates(*targets: Any) -> Callable[[_T], _T]:
    """Register a function as the translation of operators; at most one may translate each.

    Raises:
        ValueError: an operator has a translation already.
    """

    def register(translation: _T) -> _T:
        for target in targets:
            if target in _TRANSLATIONS:
                raise ValueError(f"{target} has a translation already: {_TRANSLATIONS[target]}")
            _TRANSLATIONS[target] = translation
        return translation

    return register


def is_translated(target: Any) -> bool:
    """Whether an operator has an ONNX form."""
    return target in _TRANSLATIONS


def translate(emit: Emitter, node: Node) -> Translated:
    """The ONNX value of a call.

    Raises:
        LoweringError: its operator has no ONNX form.
    """
    if node.target not in _TRANSLATIONS:
        raise untranslated(node)
    return _TRANSLATIONS[node.target](emit, node, bind(node))


def untranslated(node: Node, *more: Node) -> LoweringError:
    """The error for calls of operators that have no ONNX form."""
    others = dict.fromkeys(str(call.target) for call in more if call.target is not node.target)
    return unsupported(node, "has no ONNX translation" + ", nor has ".join(["", *others]))
