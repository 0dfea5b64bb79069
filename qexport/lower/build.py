"""From finished blocks to one ONNX model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from torch.fx import Graph

from ..artifact.cache_names import is_tokens
from ..capture.blocks import handed_on
from ..capture.graph import Port
from ..graph.meta import Meta
from ..graph.views import results_of
from . import ops as _ops  # noqa: F401  registers the translations
from .compact_padding import is_turned
from .emitter import ONNX_DTYPE, VIEW_OF, Emitter, name_of
from .fuse_norms import fuse_normalizations
from .kernel_map import KernelMap, LinearLocation, plain
from .lowered_block import LoweredBlock
from .prefill_decode import add_branches, branched, branches_of
from .qdq_patterns import input_of, linear_products
from .registry import translate
from .target import LoweringTarget


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
        graphs: the blocks that it was made of.
    """

    model: ir.Model
    linears: dict[str, LinearLocation] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    graphs: Sequence[LoweredBlock] = ()


def build_model(
    pieces: Sequence[LoweredBlock],
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    target: LoweringTarget,
    version: str,
) -> Lowered:
    """Translate blocks into one ONNX graph; tensors are read when it is saved.

    Raises:
        LoweringError: an operator has no ONNX form.
    """
    emit, book = Emitter(target.operators, target.prompts_in_floats), KernelMap(target.kernel)

    def add(piece: LoweredBlock, known: dict[str, ir.Value]) -> None:
        made = _translate(emit, piece, known)
        book.note(piece.module.graph, emit.values, made, emit.results)

    def add_for_prompts(piece: LoweredBlock, known: dict[str, ir.Value]) -> None:
        _translate(emit, piece, known)
        book.note_prompts(piece.module.graph)

    known = {port.value: _interface(port, target) for port in inputs}
    graph_inputs = list(known.values())
    inner: dict[str, ir.Value] = {}
    first, last = branched(pieces)
    for piece in pieces[:first]:
        add(piece, known)
    if first < last:
        ids = next(known[port.value] for port in inputs if is_tokens(port.name))
        wanted = {name for piece in pieces[last:] for name in piece.inputs} | {port.value for port in outputs}
        inner = add_branches(emit, pieces[first:last], known, ids, wanted, add, add_for_prompts)
    for piece in pieces[last:]:
        add(piece, known)
    graph_outputs: list[ir.Value] = []
    for port in outputs:
        value = known[port.value]
        if value.producer() is None or value in graph_outputs:
            value = emit.op("Identity", value)
        graph_outputs.append(_named(value, port, target))
    graph = ir.Graph(
        graph_inputs, graph_outputs, nodes=emit.nodes, initializers=list(emit.initializers.values()), name="qexport"
    )
    branches = branches_of(graph)
    for branch in branches:
        _drop_unused_nodes(branch)
    _drop_unused(graph)
    tensors = {name: _size_in_file(value) for name, value in graph.initializers.items()}
    read_next = [*(piece.inputs for piece in pieces[1:]), ()]
    handed = {piece.name: handed_on(piece.outputs, read) for piece, read in zip(pieces, read_next, strict=True)}
    # In front of the layers of a decoder of embeddings nothing is made but their order: no value of the float model.
    handed = {name: value for name, value in handed.items() if not is_turned(value)}
    everything = [product for piece in pieces for product in linear_products(piece.module.graph)]
    lowered = Lowered(
        ir.Model(graph, ir_version=target.operators.ir_version, producer_name="qexport", producer_version=version),
        book.placed(target.slow(everything)), book.parts(), tensors, _bytes(tensors, book.members),
        {name: plain(name_of((inner | known)[value])) for name, value in handed.items()}, target.session(everything),
        pieces,
    )  # fmt: skip
    for part in (graph, *branches) if target.operators.contrib else ():
        fuse_normalizations(part)  # which hands the names on to other values
    domains = {node.domain for node in graph.all_nodes()} - {""}
    graph.opset_imports.update({"": target.operators.opset} | dict.fromkeys(sorted(domains), 1))
    return lowered


def _translate(emit: Emitter, piece: LoweredBlock, known: dict[str, ir.Value]) -> dict[str, ir.Value]:
    """Add a block's nodes; returns the results of its quantized linears, merged or not, by name.

    What linears read and make in the block is named after them: other names count operators, and would differ between
    the branches of a file.
    """
    made: dict[str, ir.Value] = {}
    emit.enter(piece.name, piece.read)
    placeholders = [n for n in piece.module.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, piece.inputs, strict=True):
        emit.values[node] = known[name]
    for node in piece.module.graph.nodes:
        if node.op == "call_function":
            value = translate(emit, node)
            if isinstance(value, tuple):
                emit.results[node] = value
                continue
            emit.values[node] = value
            if (linear := node.meta.get(Meta.RESULT_OF)) is not None:
                value.name = emit.named(f"{linear}.output")
                made[linear] = value
        elif node.op == "output":
            for result, name in zip(results_of(piece.module.graph), piece.outputs, strict=True):
                known[name] = emit.get(result)
    _name_inputs(emit, piece.module.graph, {*made.values(), *(emit.values[node] for node in placeholders)})
    return made


def _name_inputs(emit: Emitter, graph: Graph, named: set[ir.Value]) -> None:
    """Name what quantized linears read after the first that does.

    Args:
        named: values that have a name of their own.
    """
    for product in linear_products(graph):
        value = emit.values.get(input_of(product))
        if value is not None and value.producer() is not None and value not in named:
            value.name = emit.named(f"{product.meta[Meta.LINEAR]}.input")
            named.add(value)


def _interface(port: Port, target: LoweringTarget) -> ir.Value:
    stays_float = port.dtype.is_floating_point and port.dtype.itemsize > 1  # a cache of 8-bit floats is one of codes
    dtype = target.dtype if stays_float else port.dtype
    return ir.Value(name=port.name, shape=ir.Shape(port.dims), type=ir.TensorType(ONNX_DTYPE[dtype]))


def _named(value: ir.Value, port: Port, target: LoweringTarget) -> ir.Value:
    interface = _interface(port, target)
    value.name, value.shape, value.type = interface.name, interface.shape, interface.type
    return value


def _size_in_file(initializer: ir.Value) -> int:
    """Bytes of a tensor; 0 for one that is made of another's."""
    if VIEW_OF in initializer.meta or initializer.const_value is None:
        return 0
    return initializer.const_value.nbytes


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
            spans = {linear: span for linear, span in linears.items() if span is not None}
            size, end = sizes.pop(name), max(stop for _, stop in spans.values())
            for linear, (start, stop) in spans.items():
                sizes[linear] += size * stop // end - size * start // end  # rounded so that the sum stays the size
    return sizes


def _drop_unused_nodes(graph: ir.Graph) -> None:
    """Remove nodes nobody reads: sizes that a Reshape keeps by itself."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(out.uses() or out in outputs for out in node.outputs):
            graph.remove(node, safe=True)


def _drop_unused(graph: ir.Graph) -> None:
    """Remove nodes nobody reads, and then constants nobody reads."""
    _drop_unused_nodes(graph)
    outputs = set(graph.outputs)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and value not in outputs]:
        del graph.initializers[name]
    for value in graph.initializers.values():
        if value.meta.get(VIEW_OF, name_of(value)) not in graph.initializers:
            del value.meta[VIEW_OF]  # it is the only one with these bytes
