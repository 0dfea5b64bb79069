"""From finished blocks to one ONNX model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir
import torch
from torch.fx import Graph, GraphModule, Node

from .. import ops as _ops  # noqa: F401  registers the operators
from ..capture.graph import Port
from .emitter import ONNX_DTYPE, VIEW_OF, Emitter, unsupported
from .fuse import fuse_norms
from .ops import elementwise, embedding, grouped, layers, quantized, shapes
from .targets.forms import linear_products

OPSET = 23  # Attention, RMSNormalization and RotaryEmbedding appeared here
TRANSLATIONS = {
    **elementwise.TRANSLATIONS, **shapes.TRANSLATIONS, **layers.TRANSLATIONS, **grouped.TRANSLATIONS,
    **quantized.TRANSLATIONS, **embedding.TRANSLATIONS,
}  # fmt: skip


class Target(Protocol):
    """What a target module offers; see targets/cpu.py and targets/cuda.py."""

    name: str
    provider: str
    dtype: torch.dtype

    def session(self, products: Sequence[Node] = ()) -> dict[str, str]: ...
    def slow(self, products: Sequence[Node]) -> dict[str, str]: ...
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


@dataclass(frozen=True)
class Placed:
    """Where a quantized linear is.

    Attributes:
        node: name of its product; kernel: operator that it must become.
        output: value of its result; columns: (start, stop) of the result in it, None where it is all of it.
        slow: why another kernel of the same operator would be faster than its; empty where none would, None where the
            operator has one.
    """

    node: str
    kernel: str
    output: str
    columns: tuple[int, int] | None
    slow: str | None = None


@dataclass
class Lowered:
    """An ONNX model and where to find things in it.

    Attributes:
        linears: the quantized linears.
        parts: for linears of more than one product, (node name, operator it must become) of the others.
        tensors: bytes of every tensor in the file by name; 0 for one made of another's bytes.
        bytes: of the tensors of each quantized linear in the file; merged linears share theirs by their columns.
        blocks: for each block the value it hands to the next one.
        session: session entries of this file.
    """

    model: ir.Model
    linears: dict[str, Placed] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)


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
    products, members, parts, lowered_blocks = {}, {}, {}, {}
    made: dict[str, ir.Value] = {}
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        made |= _translate(emit, piece, known)
        for product in linear_products(piece.module.graph):
            found = (emit.values[product].producer().name, target.kernel(product))
            owner = product.meta.get("plane_of") or product.meta.get("branch_of")
            if owner:
                parts[owner] = (*parts.get(owner, ()), found)
            else:
                name = product.meta["linear"]
                products[name], members[name] = found, product.meta.get("columns") or {name: None}
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
    tensors = {n: 0 if VIEW_OF in v.meta else v.const_value.nbytes for n, v in graph.initializers.items()}
    model = ir.Model(graph, ir_version=11, producer_name="qexport", producer_version=version)
    everything = [product for piece in pieces for product in linear_products(piece.module.graph)]
    slow = target.slow(everything)
    lowered = Lowered(
        model,
        # Values are asked for now, because one that is an output of the model goes by the output's name.
        {
            linear: Placed(node, kernel, made[name].name, columns, slow.get(name))
            for name, (node, kernel) in products.items()
            for linear, columns in members[name].items()
        },
        {
            linear: found
            for name, linears in members.items()
            for linear in linears
            if (found := tuple(dict.fromkeys(parts.get(name, ()) + parts.get(linear, ()))))
        },
        tensors,
        _bytes(tensors, members),
        {name: known[value].name for name, value in lowered_blocks.items()},
        target.session(everything),
    )
    fuse_norms(graph)  # which hands the names on to other values
    return lowered


def _translate(emit: Emitter, piece: Piece, known: dict[str, ir.Value]) -> dict[str, ir.Value]:
    """Add a block's nodes; returns the results of its quantized linears, merged or not, by name."""
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


def _bytes(tensors: Mapping[str, int], members: Mapping[str, Mapping[str, tuple[int, int] | None]]) -> dict[str, int]:
    """Bytes of the tensors that belong to each linear: their names begin with its name, or with that of a product.

    Args:
        members: by the name of a product, its linears and their columns.
    """
    sizes = dict.fromkeys([*members, *(linear for linears in members.values() for linear in linears)], 0)
    for name, nbytes in tensors.items():
        parents = (name[:i] for i, letter in enumerate(name) if letter == ".")
        owner = next((parent for parent in parents if parent in sizes), None)
        if owner is not None:
            sizes[owner] += nbytes
    for name, linears in members.items():
        if name not in linears:
            size, end = sizes.pop(name), max(stop for _, stop in linears.values())
            for linear, (start, stop) in linears.items():
                sizes[linear] += size * stop // end - size * start // end  # rounded so that the sum stays the size
    return sizes


def _drop_unused(graph: ir.Graph) -> None:
    """Remove nodes nobody reads (sizes that a Reshape keeps by itself), and then constants nobody reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(out.uses() or out in outputs for out in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and value not in outputs]:
        del graph.initializers[name]
