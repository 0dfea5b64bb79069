"""Capturing any nn.Module with example inputs."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from ..errors import CaptureError, InputError
from ..graph import ops  # noqa: F401  registers the operators
from ..graph.edit import get_tensor
from ..graph.meta import Meta
from ..graph.translated import without_form
from ..models.checkpoint import StateDict
from ..models.quiet import quiet_transformers
from ..models.witness import ModuleWitness, leaves
from .blocks import cut
from .decompose import decomposed
from .dynamic import Axes, DynamicShapes, Hint, dynamic_axes
from .explain import explained, functional
from .fold import fold_batch_norms, fold_padding, fold_weights, spell_padding
from .graph import CapturedModel, Port
from .lengths import lengths_as_sizes
from .memos import Memos, RemembersMore
from .normalize import to_normal_form
from .recurrent import layers_as_nodes, name_gates
from .whole_numbers import divided_whole

aten = torch.ops.aten
Inputs = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


def capture_module(
    model: torch.nn.Module,
    example_inputs: Inputs,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    absent: Collection[str] = (),
    fake: FakeTensorMode | None = None,
) -> CapturedModel:
    """Capture a module that maps tensors to a tensor, or to a tuple, dict or output class of transformers of tensors.

    An output goes by its key; a tensor alone is "output", those of a tuple "output_0" and so on.

    Args:
        model: in evaluation mode while it is traced; its parameters stay where they are.
        example_inputs: the tensors of one forward call, in order or by the names of forward's parameters.
        dynamic_shapes: by input name, the dimensions that may change and their names: {"x": {0: "batch", 1: "length"}}.
            None: the first dimension of every input, "batch" where it is as long as the first input's, else
            "{input}.batch". What torch.export takes will do too: an entry for every input in order or by name, of
            dimensions by number or in order; torch.export.Dim objects, whose bounds are not kept, Dim.AUTO and
            Dim.DYNAMIC, None or Dim.STATIC for what never changes.
        absent: weights that are not known; outputs that depend on them are left out.
        fake: the mode of the parameters of a model that has no weights.

    Raises:
        InputError: an input is no tensor, or dynamic_shapes names what is not there.
        CaptureError: torch.export cannot follow the model, or a dynamic dimension is not free in it.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "is a TorchScript module, which torch.export cannot follow", place=type(model).__name__,
            remedy="Pass the Python module that it was scripted or traced from",
        )  # fmt: skip
    given = named_inputs(model, example_inputs)
    axes = dynamic_axes(given, dynamic_shapes)
    examples = {name: _stretched(tensor, axes[name]) for name, tensor in given.items()}
    if fake is not None:
        examples = {name: fake.from_tensor(tensor, static_shapes=True) for name, tensor in examples.items()}
    shapes = {name: dict.fromkeys(axes[name], torch.export.Dim.AUTO) for name in given}
    with evaluating(model), torch.no_grad(), quiet_transformers(), lengths_as_sizes(model):
        exported = functional(_exported(model, examples, shapes, known=fake is None), model)
    captured = _captured(exported, model, axes, absent)
    if any(without_form(block.module.graph) for block in captured.blocks):
        captured = _captured(decomposed(exported), model, axes, absent)
    return replace(captured, witness=_witness(model, given, axes))


def _exported(
    model: torch.nn.Module, examples: Mapping[str, torch.Tensor], shapes: dict[str, Any], *, known: bool
) -> ExportedProgram:
    """A module through torch.export; known: its weights are there."""

    def export() -> ExportedProgram:
        with explained(model), layers_as_nodes():
            return torch.export.export(model, (), dict(examples), dynamic_shapes=shapes, strict=False)

    memos = Memos(model)
    try:
        return export()
    except RemembersMore:
        if not known or not memos.fill(examples):
            raise
        return export()
    finally:
        memos.forget()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A module in evaluation mode; every part of it is left in the mode that it had, whatever that of the whole is."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _witness(model: torch.nn.Module, given: Mapping[str, torch.Tensor], axes: Axes) -> ModuleWitness:
    """The module on the example inputs, and on one more row of them where their first dimension is dynamic."""

    def run(feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with evaluating(model), torch.no_grad():
            result = model(**feeds)
        named = {"output": result} if isinstance(result, torch.Tensor) else dict(leaves(result))
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}

    longer = {name: torch.cat([t, t[:1]]) if 0 in axes[name] else t for name, t in given.items()}
    calls = [given] if all(longer[name] is t for name, t in given.items()) else [given, longer]
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in [torch.float32, *dtypes])
    return ModuleWitness(model, f"the module's own forward, {type(model).__name__}", run, calls, eps)


def _captured(exported: ExportedProgram, model: torch.nn.Module, axes: Axes, absent: Collection[str]) -> CapturedModel:
    whole = exported.module(check_guards=False)
    for node in whole.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta[Meta.MODULE_PATH] = next(reversed(stack.values()))[0] if stack else ""
    divided_whole(whole.graph)
    spell_padding(whole)
    fold_padding(whole)
    folded = fold_weights(whole)
    folded |= fold_batch_norms(whole)
    to_normal_form(whole)
    for node in whole.graph.nodes:
        # What made its input contiguous was a no-op and is gone.
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    name_gates(whole.graph)
    placeholders = [n for n in whole.graph.nodes if n.op == "placeholder"]
    names = _pytree.tree_unflatten(placeholders, exported.call_spec.in_spec)[1]
    dimension = _dimensions(names, axes)
    inputs = [_port(name, names[name], dimension) for name in axes]
    results = _known(_results(exported, whole), absent)
    whole.graph.output_node().args = (tuple(results.values()),)
    # Everything that nothing reads: fx would keep attention, as it may draw random numbers.
    whole.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    outputs = [_port(name, node, dimension) for name, node in results.items()]
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    used = {n.target for n in whole.graph.nodes if n.op == "get_attr"}
    return CapturedModel(
        kind="module",
        blocks=cut(whole, [port.value for port in outputs]),
        inputs=inputs,
        outputs=outputs,
        weights=StateDict(model, folded),
        constants={n: get_tensor(whole, n).detach() for n in used - parameters - folded.keys()},
        settings={"inputs": {port.name: list(port.dims) for port in inputs}},
    )


def named_inputs(model: torch.nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The inputs of a forward call by the names of its parameters.

    Raises:
        InputError: there are more than forward takes, one has no name, or is no tensor with a dimension.
    """
    if not isinstance(inputs, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if len(inputs) > len(plain):
            raise InputError(
                f"{len(inputs)} inputs, but forward has {len(plain)} named parameters",
                place="example_inputs", remedy="Give forward a named parameter for every tensor",
            )  # fmt: skip
        inputs = dict(zip(plain, inputs, strict=False))
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            raise InputError(f"input {name} is not a tensor with a batch dimension", place="example_inputs")
    if not inputs:
        raise InputError("there are none", place="example_inputs", remedy="Pass the tensors of one forward call")
    return dict(inputs)


def axes_of(inputs: Mapping[str, Sequence[int | str]]) -> Axes:
    """The dynamic dimensions that a module was captured with, from `settings["inputs"]`."""
    return {name: {i: d for i, d in enumerate(dims) if isinstance(d, str)} for name, dims in inputs.items()}


def _stretched(tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """At least 2 of every dynamic dimension: torch.export takes a 1 for a size that never changes."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor.contiguous()


def _dimensions(placeholders: Mapping[str, Node], axes: Axes) -> Callable[[int | torch.SymInt], int | str]:
    """What a size of the graph is called: a number, a dimension's name, or an expression of such names.

    Raises:
        CaptureError: a dimension that is to be dynamic is not.
    """
    names: dict[sympy.Symbol, str] = {}
    for name, node in placeholders.items():
        for axis, label in axes[name].items():
            size = node.meta["val"].shape[axis]
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if not isinstance(expression, sympy.Symbol) or names.get(expression, label) != label:
                if isinstance(label, Hint):
                    continue
                what = names.get(expression) or expression or size
                raise CaptureError(
                    f"dimension {axis} ({label}) of {name} is always {what} in this model", place="dynamic_shapes",
                    remedy="Look for a loop over that size, a shape written as a number, or sizes that have to be "
                    "equal; or leave the dimension out of dynamic_shapes",
                )  # fmt: skip
            names[expression] = label
    symbols = {symbol: sympy.Symbol(label) for symbol, label in names.items()}

    def called(size: int | torch.SymInt) -> int | str:
        expression = sympy.sympify(size if isinstance(size, int) else size.node.expr).xreplace(symbols)
        return int(expression) if expression.is_number else str(expression).replace(" ", "")

    return called


def _results(exported: ExportedProgram, whole: GraphModule) -> dict[str, Node]:
    """The tensors of the result by name, in order."""
    flat = whole.graph.output_node().args[0]
    flat = list(flat) if isinstance(flat, (tuple, list)) else [flat]
    result = _pytree.tree_unflatten(flat, exported.call_spec.out_spec)
    if isinstance(result, Node):
        return {"output": result}
    tensors = [(name, node) for name, node in leaves(result) if isinstance(node, Node)]
    return {name: node for name, node in tensors if isinstance(node.meta["val"], torch.Tensor)}


def _known(results: dict[str, Node], absent: Collection[str]) -> dict[str, Node]:
    """The results that do not depend on weights which are absent.

    Raises:
        CaptureError: they all do.
    """
    if not absent or not results:
        return results
    graph, unknown = next(iter(results.values())).graph, set[Node]()
    for node in graph.nodes:
        if (node.op == "get_attr" and node.target in absent) or not unknown.isdisjoint(node.all_input_nodes):
            unknown.add(node)
    known = {name: node for name, node in results.items() if node not in unknown}
    if not known:
        raise CaptureError(
            f"{len(absent)} weights are not in the checkpoint, first {min(absent)}",
            remedy="The config does not belong to these weights, or the download is incomplete",
        )
    return known


def _port(name: str, node: Node, called: Callable) -> Port:
    value = node.meta["val"]
    sizes = tuple(size if isinstance(size, int) else size.node.hint for size in value.shape)
    return Port(name, node.name, value.dtype, tuple(called(d) for d in value.shape), sizes)
