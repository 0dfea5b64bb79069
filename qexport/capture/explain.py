"""Why a module cannot become a graph: the line of the user's code, and what to do about it."""

import inspect
import logging
import operator
import re
import traceback
import warnings
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..errors import CaptureError, root_cause
from .decompose import by_rules
from .lines import innermost, line_of
from .memos import RemembersMore

aten = torch.ops.aten
_LIBRARIES = ("torch", "transformers")
_VALUES = "A graph cannot follow the values of tensors: {what}"
_BRANCH = _VALUES.format(
    what="choose with torch.where instead of if, and keep loop counts and sizes independent of tensors, or export the"
    " part around that line as a module of its own"
)
_ITEM = _VALUES.format(what="compute with the tensor itself instead of the number that .item() or .tolist() takes out")
_NUMPY = _VALUES.format(what="use torch functions instead of NumPy's")
_SIZE = _VALUES.format(what="keep all elements, and choose with torch.where or a mask")
_CONTROL_FLOW = ("cond", "while_loop", "map_impl", "scan", "associative_scan")
_STATE = "Return it as an output, or take it as an input; what a call leaves in the module is lost in a graph"
_IN_PLACE = re.compile(
    r"\s*(?:[-+*/|&%]|//|\*\*)?=(?!=)|\.(?:append|extend|insert|update|add|pop)\(|\[[^\]]*\]\s*=(?!=)"
)


@contextmanager
def explained(model: torch.nn.Module):
    """Turn whatever torch.export raises inside into a CaptureError, and refuse Python state that the call changed."""
    before, after = _state(model), {}
    # torch.export puts attributes back when it is done, so they are read as soon as forward is through.
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    hook = model.register_forward_hook(lambda module, _inputs, _output: after.update(_state(module)))
    with warnings.catch_warnings(record=True) as caught, redirect_stderr(StringIO()):  # it prints half a graph
        warnings.simplefilter("always")
        try:
            yield
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises almost anything, and hides the reason behind other errors
            raise _failed(model, error) from error
        finally:
            hook.remove()
            logger.setLevel(level)
    assigned = [m[1] for w in caught if (m := re.search(r"attribute self\.(\S+) was assigned", str(w.message)))]
    changed = [path for path, value in after.items() if before.get(path, value) != value]
    kind = RemembersMore if _only_dicts(model, paths := [*assigned, *changed]) else CaptureError
    for path in paths:
        owner, attribute = _owner(model, path)
        if not _of_library(type(owner)):
            raise kind(
                f"forward changes self.{attribute}{_assignment(owner, attribute)}, which a graph cannot do",
                place=_place(model, path), remedy=_STATE,
            )  # fmt: skip


def functional(exported: ExportedProgram, model: torch.nn.Module) -> ExportedProgram:
    """The same program without operators that write into a tensor.

    Raises:
        CaptureError: it writes into a buffer or an input, takes a number out of a tensor, makes sizes of values, or
            branches and loops by the operators that PyTorch has for that.
    """
    check_sizes(exported, model)
    _check_control_flow(exported, model)
    _forget_assertions(exported)
    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target in (aten.item.default, aten._local_scalar_dense.default):
            raise CaptureError(
                f"needs the value of a tensor{line_of(node)}", place=_module_of(node, model), remedy=_ITEM
            )
    if not any(_writes(node) for node in exported.graph.nodes):
        return exported
    pure = by_rules(exported, {})
    changed = [*pure.graph_signature.buffers_to_mutate.values(), *pure.graph_signature.user_inputs_to_mutate.values()]
    if changed:
        writer = next((n for n in exported.graph.nodes if _writes(n) and n.args[0].op == "placeholder"), None)
        raise CaptureError(
            f"forward writes into {changed[0]}{line_of(writer) if writer else ''}, which a graph cannot do",
            place=type(model).__name__, remedy=_STATE,
        )  # fmt: skip
    return pure


def _forget_assertions(exported: ExportedProgram) -> None:
    """Drop assertions on values, which compute nothing, and numbers that were taken out of tensors for them alone."""
    graph = exported.graph
    for node in reversed(graph.nodes):
        asserts = node.target in (aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)
        if asserts or (_computes(node) and not node.users and not node.is_impure()):
            graph.erase_node(node)


def _computes(node: Node) -> bool:
    """Whether it is an operator or arithmetic of numbers: what opens and closes a vmap makes nothing, and is wanted."""
    module = getattr(node.target, "__module__", None)
    return isinstance(node.target, torch._ops.OpOverload) or module in (operator.__name__, "_operator", "math", "torch")


def _check_control_flow(exported: ExportedProgram, model: torch.nn.Module) -> None:
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _CONTROL_FLOW:
            raise CaptureError(
                f"torch.{node.target.name().removesuffix('_impl')} holds graphs of its own, whose linears no pass would"
                f" see{line_of(node)}", place=_module_of(node, model), remedy=_BRANCH,
            )  # fmt: skip


def check_sizes(exported: ExportedProgram, model: torch.nn.Module) -> None:
    """Raises CaptureError where the size of a tensor depends on values."""
    for node in exported.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor) and free_unbacked_symbols(node.meta["val"]):
            raise CaptureError(
                f"makes a tensor whose size depends on values{line_of(node)}", place=_module_of(node, model),
                remedy=_SIZE,
            )  # fmt: skip


def _failed(model: torch.nn.Module, error: BaseException) -> CaptureError:
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    name, text = type(root).__name__, str(root)
    where = innermost(traceback.extract_tb(root.__traceback__) or traceback.extract_tb(error.__traceback__))
    if name in ("GuardOnDataDependentSymNode", "DataDependentOutputException"):
        why, remedy = "its control flow depends on the value of a tensor", _BRANCH
    elif ".numpy()" in text or "DynamicOutputShapeException" in name:
        why, remedy = f"torch.export failed: {root_cause(error)}", _NUMPY if ".numpy()" in text else _BRANCH
    else:
        why, remedy = (
            f"torch.export failed: {root_cause(error)}",
            "Rewrite that line with functions that torch.export knows",
        )
    return CaptureError(f"{why}{where}", place=type(model).__name__, remedy=remedy)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _module_of(node: Node, model: torch.nn.Module) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return (next(reversed(stack.values()))[0] if stack else "") or type(model).__name__


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """Numbers, texts and lengths of containers that modules keep as attributes."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute == "training":
                continue
            path = f"{name}.{attribute}" if name else attribute
            if isinstance(value, (bool, int, float, str)):
                found[path] = value
            elif isinstance(value, (list, dict, set)):
                found[path] = len(value)
    return found


def _only_dicts(model: torch.nn.Module, paths: list[str]) -> bool:
    owners = (_owner(model, path) for path in paths)
    return all(isinstance(getattr(owner, attribute, None), dict) for owner, attribute in owners)


def _owner(model: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    path = path.partition("[")[0]
    owner, _, attribute = path.rpartition(".")
    try:
        return model.get_submodule(owner), attribute
    except AttributeError:
        return model, path


def _of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _assignment(owner: torch.nn.Module, attribute: str) -> str:
    """Where a method of a module changes an attribute, as far as its source is there."""
    try:
        lines, first = inspect.getsourcelines(type(owner).forward)
        file = inspect.getsourcefile(type(owner).forward)
    except (OSError, TypeError):
        return ""
    for number, line in enumerate(lines, first):
        found = line.find(f"self.{attribute}")
        if found >= 0 and _IN_PLACE.match(line, found + len(f"self.{attribute}")):
            return f" at {file}:{number}: {line.strip()}"
    return ""


def _place(model: torch.nn.Module, path: str) -> str:
    owner = path.partition("[")[0].rpartition(".")[0]
    return f"{type(model).__name__}.{owner}" if owner else type(model).__name__
