"""From finished blocks to one ONNX model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir
import torch
from torch.fx import Graph, GraphModule, Node

from .. import ops as _ops  # noqa: F401  registers the operators
from ..capture.graph import Port
from .emitter import ONNX_DTYPE, Emitter, unsupported
from .ops import elementwise, grouped, layers, quantized, shapes
from .targets.forms import linear_products

OPSET = 23  # Attention, RMSNormalization and RotaryEmbedding appeared here
TRANSLATIONS = {
    **elementwise.TRANSLATIONS, **shapes.TRANSLATIONS, **layers.TRANSLATIONS, **grouped.TRANSLATIONS,
    **quantized.TRANSLATIONS,
}  # fmt: skip


class Target(Protocol):
    """What a target module offers; see targets/cpu.py and targets/cuda.py."""

    name: str
    provider: str
    dtype: torch.dtype

    def session(self) -> dict[str, str]: ...
    def numerics(self) -> dict[str, str]: ...
    def rewrite(self, module: GraphModule, constants: set[str]) -> None: ...
    def kernel(self, product: Node) -> str: ...


@dataclass(frozen=True)
class Piece:
    """A block ready to be written, its graph already rewritten for the target.

    Attributes:
        read: the tensor of a get_attr node, called only while the file is written.
    """

    name: str
    module: GraphModule
    inputs: Sequence[str]
    outputs: Sequence[str]
    read: Callable[[str], torch.Tensor]


@dataclass
class Lowered:
    """An ONNX model and where to find things in it.

    Attributes:
        linears: for each quantized linear (node name, value of its result, operator it must become).
        parts: for linears of more than one product, (node name, operator it must become) of the others.
        bytes: of the tensors of each quantized linear in the file.
        blocks: for each block the value it hands to the next one.
    """

    model: ir.Model
    linears: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)


def check_translations(graphs: Iterable[Graph]) -> None:
    """Find operators without an ONNX form before any work is done on a model.

    Raises:
        LoweringError: names the first one and where it is.
    """
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_function":
                _translation(node)


def build(
    pieces: Sequence[Piece], inputs: Sequence[Port], outputs: Sequence[Port], target: Target, version: str
) -> Lowered:
    """Translate blocks into one ONNX graph at opset 23; tensors are read when it is saved.

    Raises:
        LoweringError: an operator has no ONNX form.
    """
    emit = Emitter()
    known = {port.value: _interface(port, target) for port in inputs}
    graph_inputs = list(known.values())
    lowered_linears, lowered_blocks, parts = {}, {}, {}
    made: dict[str, ir.Value] = {}
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        made |= _translate(emit, piece, known)
        for product in linear_products(piece.module.graph):
            found = (emit.values[product].producer().name, target.kernel(product))
            owner = product.meta.get("plane_of") or product.meta.get("branch_of")
            if owner:
                parts[owner] = (*parts.get(owner, ()), found)
            else:
                lowered_linears[product.meta["linear"]] = found
        # A block reads the residual stream before anything else that comes from outside.
        read = following.inputs if following else ()
        lowered_blocks[piece.name] = next((name for name in read if name in piece.outputs), piece.outputs[0])
    graph_outputs: list[ir.Value] = []
    for port in outputs:
        value = known[port.value]
        if value.producer() is None or value in graph_outputs:
            value = emit.op("Identity", value)
        graph_outputs.append(_named(value, port, target))
    graph = ir.Graph(
        graph_inputs, graph_outputs, nodes=emit.nodes, initializers=list(emit.initializers.values()),
        opset_imports={"": OPSET} | dict.fromkeys({n.domain for n in emit.nodes} - {""}, 1), name="qexport",
    )  # fmt: skip
    _drop_unused(graph)
    model = ir.Model(graph, ir_version=11, producer_name="qexport", producer_version=version)
    return Lowered(
        model,
        # Asked for now, because a value that is an output of the model goes by the output's name.
        {name: (node, made[name].name, kernel) for name, (node, kernel) in lowered_linears.items()},
        parts,
        _bytes(graph, lowered_linears),
        {name: known[value].name for name, value in lowered_blocks.items()},
    )


def _translate(emit: Emitter, piece: Piece, known: dict[str, ir.Value]) -> dict[str, ir.Value]:
    """Add a block's nodes; returns the results of its quantized linears by name."""
    made: dict[str, ir.Value] = {}
    emit.enter(piece.name, piece.read)
    placeholders = [n for n in piece.module.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, piece.inputs, strict=True):
        emit.values[node] = known[name]
    for node in piece.module.graph.nodes:
        if node.op == "call_function":
            value = emit.values[node] = _translation(node)(emit, node)
            linear = node.meta.get("result_of")
            if linear is not None:
                value.name = f"{linear}.output"
                made[linear] = value
        elif node.op == "output":
            for result, name in zip(node.args[0], piece.outputs, strict=True):
                known[name] = emit.get(result)
    return made


def _translation(node: Node) -> Callable:
    if node.target not in TRANSLATIONS:
        raise unsupported(node, "has no ONNX translation")
    return TRANSLATIONS[node.target]


def _interface(port: Port, target: Target) -> ir.Value:
    dtype = target.dtype if port.dtype.is_floating_point else port.dtype
    return ir.Value(name=port.name, shape=ir.Shape(port.dims), type=ir.TensorType(ONNX_DTYPE[dtype]))


def _named(value: ir.Value, port: Port, target: Target) -> ir.Value:
    interface = _interface(port, target)
    value.name, value.shape, value.type = interface.name, interface.shape, interface.type
    return value


def _bytes(graph: ir.Graph, linears: Iterable[str]) -> dict[str, int]:
    """Bytes of the initializers that belong to each linear: their names begin with its name."""
    sizes = dict.fromkeys(linears, 0)
    for name, value in graph.initializers.items():
        parents = (name[:i] for i, letter in enumerate(name) if letter == ".")
        owner = next((parent for parent in parents if parent in sizes), None)
        if owner is not None:
            sizes[owner] += value.const_value.nbytes
    return sizes


def _drop_unused(graph: ir.Graph) -> None:
    """Remove nodes nobody reads (sizes that a Reshape keeps by itself), and then constants nobody reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(out.uses() or out in outputs for out in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and value not in outputs]:
        del graph.initializers[name]
