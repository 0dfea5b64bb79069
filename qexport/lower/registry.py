"""Which function translates which operator: each is registered once, where it is written."""

from collections.abc import Callable
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from torch.fx import Node

from ..errors import LoweringError
from ..graph.edit import TensorSpec
from ..graph.meta import Meta
from ..graph.schema import Arguments, bind
from ..graph.translated import TRANSLATED
from .emitter import Emitter, unsupported

# The emitter, the node, and its arguments by name; returns the ONNX value, or a tuple where the operator makes several.
Translated = ir.Value | tuple[ir.Value, ...]
Translation = Callable[[Emitter, Node, Arguments], Translated]
_T = TypeVar("_T", bound=Translation)

_TRANSLATIONS: dict[Any, Translation] = {}
_OF_COMPLEX: dict[Any, Translation] = {}
_REASONS: dict[Any, str] = {}


def translates(*targets: Any) -> Callable[[_T], _T]:
    """Register a function as the translation of operators; at most one may translate each.

    Raises:
        ValueError: an operator has a translation already.
    """
    return _registers(_TRANSLATIONS, targets)


def translates_complex(*targets: Any) -> Callable[[_T], _T]:
    """The same for calls that read or make complex numbers, which the file has as pairs in a last axis."""
    return _registers(_OF_COMPLEX, targets)


def _registers(table: dict[Any, Translation], targets: tuple[Any, ...]) -> Callable[[_T], _T]:
    def register(translation: _T) -> _T:
        for target in targets:
            if target in table:
                raise ValueError(f"{target} has a translation already: {table[target]}")
            table[target] = translation
            TRANSLATED.add(target)
        return translation

    return register


def has_no_form(reason: str, *targets: Any) -> None:
    """Note why operators cannot be translated.

    Args:
        reason: what follows "because".
        targets: overloads, or all overloads of a packet.
    """
    for target in targets:
        overloads = target.overloads() if isinstance(target, torch._ops.OpOverloadPacket) else None
        for overload in [target] if overloads is None else [getattr(target, name) for name in overloads]:
            _REASONS[overload] = reason


def reason_of(target: Any) -> str:
    """Why an operator has no ONNX form, "" where nothing is known."""
    return _REASONS.get(target, "")


def is_translated(target: Any) -> bool:
    """Whether an operator has an ONNX form."""
    return target in TRANSLATED


def translate(emit: Emitter, node: Node) -> Translated:
    """The ONNX value of a call.

    Raises:
        LoweringError: its operator has no ONNX form.
    """
    table = _OF_COMPLEX if _has_complex(node) else _TRANSLATIONS
    if node.target not in table:
        raise untranslated(node)
    return table[node.target](emit, node, bind(node))


def _has_complex(node: Node) -> bool:
    specs = [value.meta.get(Meta.SPEC) for value in (node, *node.all_input_nodes)]
    return any(isinstance(spec, TensorSpec) and spec.dtype.is_complex for spec in specs)


def untranslated(node: Node) -> LoweringError:
    """The error for a call of an operator that has no ONNX form."""
    return unsupported(node, _why_not(node))


def _why_not(node: Node) -> str:
    if node.target in TRANSLATED:
        return "of complex numbers has no ONNX translation" if _has_complex(node) else "takes complex numbers"
    reason = reason_of(node.target)
    return "has no ONNX translation" + (f", because {reason}" if reason else "")
