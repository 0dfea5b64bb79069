"""Tracing of the same model once: nine tenths of what an export of a small model costs.

What a call gave is given again to one that says the same: classes and attributes of every module of the model, values
of its tensors, example inputs and options. Who reads a program of torch.export takes a graph of its own from it, and
who traces a language model gets blocks of its own, so that captures of one are as independent as those of two; their
tensors are compared with what they were.

What there is to trace is traced without torch's cache of the types of results, which holds few of sizes that are not
known and takes a third of the time, without the lines of code that nodes come from, a twelfth of it, and without the
code of modules that nobody calls, an eighth. But for the numbers in the names of nodes, and these lines, the graph is
the same.
"""

import hashlib
import types
from collections.abc import Hashable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch._dynamo.config
import torch.fx.config
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from transformers import PretrainedConfig, PreTrainedModel

from qexport.capture import decoder
from qexport.capture.trace import TOKEN_IDS, Reads, Traced
from qexport.graph.edit import tensors_of

_LIBRARIES = ("torch", "transformers", "qexport", "helpers")
_FOLDER = ("_name_or_path", "name_or_path")  # that a model came from: no code of it reads them
_HOOKS = ("hooks", "hooks_with_kwargs", "hooks_always_called")
_APART = ("_modules", *_FOLDER)
_export, _decompose = torch.export.export, ExportedProgram.run_decompositions
_trace = decoder.trace_model
_programs: dict[Hashable, tuple[ExportedProgram, Hashable]] = {}
_decomposed: dict[int, ExportedProgram] = {}  # by the id of a program that is kept
_models: dict[Hashable, tuple[Traced, Hashable]] = {}


@contextmanager
def anew():
    """While this lasts, models are traced faster, and each time that they are asked for."""
    with patch.object(torch._dynamo.config, "fake_tensor_cache_enabled", False), _use_lazy_graph_module(True):
        yield


@contextmanager
def remembered():
    """While this lasts, what was traced in any such context of this process is given again."""
    with ExitStack() as changes:
        changes.enter_context(anew())
        changes.enter_context(patch.object(decoder, "trace_model", _trace_once))
        changes.enter_context(patch.object(torch.export, "export", _export_once))
        changes.enter_context(patch.object(ExportedProgram, "run_decompositions", _decompose_once))
        yield


def _trace_once(
    model: PreTrainedModel, aliases: dict[str, tuple[str, ...]], place: str, reads: Reads = TOKEN_IDS
) -> Traced:
    if not _of_libraries(model):
        return _trace(model, aliases, place, reads)
    key = _said([model, aliases, reads])
    if key not in _models:
        with _without_lines():
            traced = _trace(model, aliases, place, reads)
        _models[key] = traced, _held(traced)
    traced, tensors = _models[key]
    assert _held(traced) == tensors, "a capture or what came after it wrote into the tensors of a trace"
    return replace(
        traced, blocks=[block.copy() for block in traced.blocks], ids=[*traced.ids], pasts=[[*p] for p in traced.pasts],
        presents=[[*p] for p in traced.presents], cache=[*traced.cache], constants={**traced.constants},
        pieces={**traced.pieces},
    )  # fmt: skip


def _without_lines():
    """Errors name lines of a user's model, and those of transformers only when one is traced anew."""
    return patch.object(torch.fx.config, "do_not_emit_stack_traces", True)


def _held(traced: Traced) -> Hashable:
    return _said([traced.constants, [tensors_of(block.module) for block in traced.blocks]])


def _of_libraries(model: torch.nn.Module) -> bool:
    """Whether no code of a test is part of a model: what a call of that says and does besides is tested."""
    return all(type(module).__module__.split(".")[0] in _LIBRARIES for module in model.modules())


def _export_once(model: torch.nn.Module, args: tuple, kwargs: dict | None = None, **options):
    if not _of_libraries(model):
        return _export(model, args, kwargs, **options)
    key = _said([model, args, kwargs, options])
    if key not in _programs:
        with _without_lines():
            program = _export(model, args, kwargs, **options)
        _programs[key] = program, _tensors(program)
    program, tensors = _programs[key]
    assert _tensors(program) == tensors, "a capture or what came after it wrote into the tensors of a program"
    return program


def _decompose_once(program: ExportedProgram, table: dict | None = None) -> ExportedProgram:
    if table != {} or all(kept is not program for kept, _ in _programs.values()):
        return _decompose(program, table)
    if id(program) not in _decomposed:
        _decomposed[id(program)] = _decompose(program, table)
    return _decomposed[id(program)]


def _tensors(program: ExportedProgram) -> Hashable:
    return _said([program.state_dict, program.constants])


def _said(value) -> Hashable:
    """A value as something that equals that of another just where nothing tells the two apart."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)):
        return type(value), value
    if isinstance(value, torch.Tensor):
        fake = isinstance(value, FakeTensor) or value.is_meta
        data = None if fake else value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return type(value), tuple(value.shape), value.stride(), value.dtype, fake or hashlib.sha256(data).digest()
    if isinstance(value, torch.nn.Module):
        names = {}
        shared = (names.setdefault(id(t), name) for name, t in value.named_parameters(remove_duplicate=False))
        return tuple(shared), tuple((name, _attributes(module)) for name, module in value.named_modules())
    if isinstance(value, PretrainedConfig):
        return type(value), _said({name: item for name, item in vars(value).items() if name not in _FOLDER})
    if isinstance(value, dict):
        return "dict", tuple((key, _said(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_said, value))
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted(map(repr, value)))
    if isinstance(value, partial):
        return _said([value.func, value.args, value.keywords])
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, _said([held for held in inside if not isinstance(held, torch.nn.Module)])
    return type(value), repr(value)


def _attributes(module: torch.nn.Module) -> Hashable:
    """All of a module but for its folder, its hooks and the modules in it, which have names of their own."""
    held = {name: item for name, item in vars(module).items() if name not in _APART and not name.endswith(_HOOKS)}
    return type(module), _said({n: i for n, i in held.items() if not isinstance(i, torch.nn.Module)})
