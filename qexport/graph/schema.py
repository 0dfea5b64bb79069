"""The arguments of a call by the names that its operator's schema gives them, defaults filled in.

fx stores what a caller wrote: positional arguments as far as they were given, the rest by keyword, defaults nowhere.
`bind` undoes that, so that no reader has to count places or pad tuples.
"""

import operator
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

_MISSING: Any = object()
# Functions of Python that a graph may call, which have no schema.
_PLAIN: dict[Any, Sequence[str]] = {
    operator.getitem: ("source", "index"),
    operator.neg: ("a",),
    **dict.fromkeys((operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod), ("a", "b")),
    **dict.fromkeys((torch.sym_max, torch.sym_min), ("a", "b")),
}


class Arguments(SimpleNamespace):
    """The arguments of one call, each an attribute: an fx node, a number, a list, None, as the schema says."""


def bind(node: Node) -> Arguments:
    """All arguments of a call, by the names of its operator's schema.

    Args:
        node: a call of an operator of PyTorch or of qexport, or of one of Python's that stand for sizes and tuples
            (`getitem` has source and index, arithmetic a and b).

    Raises:
        TypeError: it is no such call, or lacks an argument that has no default.
    """
    names, defaults = _signature(node.target)
    if len(node.args) > len(names):
        raise TypeError(f"{node.target} takes {len(names)} arguments, and {node.name} gives it {len(node.args)}")
    found = dict(zip(names, defaults, strict=True)) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if absent := [name for name, value in found.items() if value is _MISSING]:
        raise TypeError(f"{node.name}, a call of {node.target}, lacks {', '.join(absent)}")
    return Arguments(**found)


def rebind(node: Node, **changes: Any) -> None:
    """Give a call of an operator other arguments, by name; those that are not named stay.

    Raises:
        TypeError: it is no such call, or has no argument of a name.
    """
    given = vars(bind(node))
    if unknown := changes.keys() - given.keys():
        raise TypeError(f"{node.target} has no argument {', '.join(sorted(unknown))}")
    given = given | changes
    keywords = _keywords(node.target)
    node.args = tuple(value for name, value in given.items() if name not in keywords)
    node.kwargs = {name: given[name] for name in keywords if name in given}


def _keywords(target: Any) -> list[str]:
    """Names of the arguments that can be given by keyword only."""
    if not isinstance(target, torch._ops.OpOverload):
        return []
    return [argument.name for argument in target._schema.arguments if argument.kwarg_only]


@cache
def _signature(target: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    if isinstance(target, torch._ops.OpOverload):
        arguments = target._schema.arguments
        given = [a.default_value if a.has_default_value() else _MISSING for a in arguments]
        return tuple(a.name for a in arguments), tuple(given)
    if target in _PLAIN:
        names = tuple(_PLAIN[target])
        return names, (_MISSING,) * len(names)
    raise TypeError(f"{target} has no schema")
