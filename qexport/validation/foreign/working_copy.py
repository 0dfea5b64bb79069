"""A copy of a file whose inputs, outputs and nodes go by the names that exports have, its data linked, not copied.

Nothing that is computed changes: other names are put in front and behind by Identity, which a session takes out again.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, inliner

from ...artifact.files import link_or_copy
from ...artifact.manifest import MODEL_FILE
from ...capture.graph import CapturedModel
from ...errors import InputError, reading
from .codes_as_values import SESSION, as_quantized_values
from .finding import ForeignFile
from .ports import input_names, is_integer, output_names, paired

_INLINE = "inline.data"
_KEPT_INLINE = 1024  # bytes of a tensor that stays in the model
_OWN = "qexport/"  # in front of names of nodes that were added


def make_copy(file: ForeignFile, folder: Path, captured: CapturedModel) -> tuple[ModelProto, dict[str, str]]:
    """Write the copy into `folder`, as model.onnx, and return it without its data, and the session entries it takes.

    Args:
        captured: the float model, whose names inputs and outputs get.

    Raises:
        InputError: data of the file is missing, or its inputs are not those of the model.
    """
    with reading(file.path, "no ONNX model"):
        model = onnx.load(file.path, load_external_data=False)
        if model.functions:
            model = inliner.inline_local_functions(model)
    _constants_as_initializers(model.graph)
    _link_data(model.graph, file.path.parent, folder)
    _name_nodes(model.graph)
    _sort(model.graph)
    session = file.session | (SESSION if as_quantized_values(model.graph, folder) else {})
    _rename_ports(model.graph, captured, file.path)
    write(model, folder)
    return model, session


def write(model: ModelProto, folder: Path) -> None:
    """Write a copy once more, after values were added."""
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def _constants_as_initializers(graph: GraphProto) -> None:
    """Tensors of Constant nodes become initializers, which is where everything else looks for tensors."""
    kept = []
    for node in graph.node:
        value = next((a for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
            continue
        value.t.name = node.output[0]
        graph.initializer.append(value.t)
    nodes = [copied(node) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)


def copied(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node on its own; those of a graph go with it."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _link_data(graph: GraphProto, source: Path, folder: Path) -> None:
    """External data becomes links in `folder` (copies on another disk), and long tensors in the model external."""
    linked: dict[str, str] = {}
    with open(folder / _INLINE, "wb") as inline:
        for tensor in _tensors(graph):
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                where = entries["location"]
                if where not in linked:
                    linked[where] = f"{len(linked)}.data"
                    _link(source / where, folder / linked[where])
                offset = int(entries.get("offset", 0))
                size = (folder / linked[where]).stat().st_size
                _place(tensor, linked[where], offset, int(entries.get("length", size - offset)))
                if offset + int(entries.get("length", 0)) > size:
                    raise InputError(f"is shorter than {tensor.name} needs", place=str(source / where))
            elif len(tensor.raw_data) > _KEPT_INLINE:
                raw = tensor.raw_data
                tensor.ClearField("raw_data")
                inline.write(b"\0" * (-inline.tell() % 64))
                _place(tensor, _INLINE, inline.tell(), len(raw))
                inline.write(raw)


def _place(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _link(source: Path, target: Path) -> None:
    if not source.is_file():
        raise InputError("is missing, and the model has its tensors there", place=str(source))
    link_or_copy(source, target)


def _name_nodes(graph: GraphProto) -> None:
    """Every node gets a name of its own: by it the optimized graph is asked."""
    taken = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{_OWN}{node.op_type}_{index}"
        taken.add(node.name)


def _sort(graph: GraphProto) -> None:
    """Nodes behind what they read, which some tools do not keep to and ONNX Runtime does not ask for."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    order, placed = [], set()
    for start in range(len(graph.node)):
        waiting = [start]
        while waiting:
            index = waiting[-1]
            needed = [makers[name] for name in _read(graph.node[index]) if name in makers]
            missing = [] if index in placed else [other for other in needed if other not in placed and other != index]
            if missing:
                waiting += reversed(missing)
                continue
            waiting.pop()
            if index not in placed:
                placed.add(index)
                order.append(index)
    nodes = [copied(graph.node[index]) for index in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, in its branches too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _read(inner)


def _rename_ports(graph: GraphProto, captured: CapturedModel, path: Path) -> None:
    defaults = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in defaults]
    names = _input_names(given, captured, path)
    nodes = [node for value in given if (node := _behind(graph, value, names[value.name])) is not None]
    if nodes:
        rest = [copied(node) for node in graph.node]
        del graph.node[:]
        graph.node.extend([*nodes, *rest])
    # What is left of the graph's inputs has defaults, and a session need not be given it.
    values = [_named(value, names[value.name]) for value in given]
    del graph.input[:]
    graph.input.extend(values)
    if captured.kind == "module":
        named = paired(graph.output, [port.name for port in captured.outputs], "output", str(path))
    else:
        named = output_names(graph.output, captured.kind, captured.outputs[0].name)
    _rename_outputs(graph, named)


def _input_names(
    given: Sequence[onnx.ValueInfoProto], captured: CapturedModel, path: Path
) -> Mapping[str, str]:  # fmt: skip
    if captured.kind == "module":
        return paired(given, [port.name for port in captured.inputs], "input", str(path))
    return input_names(given, str(path))


def _behind(graph: GraphProto, value: onnx.ValueInfoProto, name: str) -> onnx.NodeProto | None:
    """The node that makes the input `value` out of one called `name`; None where the file has that."""
    kind = value.type.tensor_type.elem_type
    if is_integer(value) and kind != TensorProto.INT64:
        inside = value.name
        if inside == name:
            _replace(graph, name, inside := f"{_OWN}{name}_{kind}")
        return helper.make_node("Cast", [name], [inside], f"{_OWN}{name}", to=kind)
    return None if value.name == name else helper.make_node("Identity", [name], [value.name], f"{_OWN}{name}")


def _replace(graph: GraphProto, old: str, new: str) -> None:
    """Every reader of a value reads another one, those inside of branches too."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _replace(attribute.g, old, new)


def _named(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    made = onnx.ValueInfoProto()
    made.CopyFrom(value)
    made.name = name
    if is_integer(value):
        made.type.tensor_type.elem_type = TensorProto.INT64
    return made


def _rename_outputs(graph: GraphProto, names: Mapping[str, str]) -> None:
    kept = []
    for value in graph.output:
        if (name := names.get(value.name)) is None:
            continue
        kept.append(_named(value, name))
        if name != value.name:
            graph.node.append(helper.make_node("Identity", [value.name], [name], f"{_OWN}{name}"))
    del graph.output[:]
    graph.output.extend(kept)
