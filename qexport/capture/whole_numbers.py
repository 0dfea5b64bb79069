"""int() in the code of a model, of a size that torch.export does not know: Python would make a constant of it."""

import math
import operator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import Graph, Node

from .stand_ins import standing_in


class _OfSizes(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __call__(cls, *given: Any) -> Any:
        if len(given) == 1 and isinstance(given[0], torch.SymInt | torch.SymFloat):
            return torch.sym_int(given[0])
        return int(*given)


class _Int(metaclass=_OfSizes):
    """int, of which torch.export sees what it computes."""


def whole_numbers_of_sizes(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Let int() in the file that a model's class is of keep a size that is free."""
    return standing_in("int", _Int, [type(model).__module__])


def divided_whole(graph: Graph) -> None:
    """Write int(a / b + c) of sizes, c whole, as a // b + c: the same where it is not negative, and no floats."""
    for node in list(graph.nodes):
        if node.target is not math.trunc:
            continue
        more: Any
        quotient, more = node.args[0], 0.0
        if isinstance(quotient, Node) and quotient.target is operator.add and isinstance(quotient.args[1], int | float):
            quotient, more = quotient.args
        if not (isinstance(quotient, Node) and quotient.target is operator.truediv and float(more).is_integer()):
            continue
        with graph.inserting_before(node):
            whole = graph.call_function(operator.floordiv, quotient.args)
            total = graph.call_function(operator.add, (whole, int(more)))
        for made in (whole, total):
            made.meta.update(node.meta)
        node.replace_all_uses_with(total)
