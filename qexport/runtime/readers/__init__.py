"""Which nodes of an exported file another runtime has no kernel for, by tables of its operators.

A table is a YAML file here with the version it holds for and where it comes from. It knows operators, their versions
and the type of their first input, and conditions on attributes and inputs; a runtime may refuse a node for other
reasons, and leaves small integer arithmetic on shapes to the CPU on its own account.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import onnx
import yaml
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict

from ...artifact.manifest import MODEL_FILE
from ...errors import InputError, reading

_STANDARD = ("", "ai.onnx")
_CONTRIB = "com.microsoft"
# What onnxruntime keeps in ONNX's own domain without it being ONNX's: its table has them among the contrib operators.
_OWN = "SimplifiedLayerNormalization"


class Condition(BaseModel):
    """What a runtime wants of a node besides.

    Attributes:
        attributes: the values that each of them may have; one that is absent has any.
        present, absent, constant: numbers of inputs that must be there, may not be, or must be initializers where they
            are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attributes: Mapping[str, tuple[int, ...]] = {}
    present: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()

    def why_not(self, node: onnx.NodeProto, constants: Collection[str]) -> str:
        """What a node does not fulfil; empty where nothing.

        Args:
            constants: values that are known when the file is loaded.
        """
        for attribute in node.attribute:
            given = onnx.helper.get_attribute_value(attribute)
            if attribute.name in self.attributes and given not in self.attributes[attribute.name]:
                return f"not with {attribute.name} {given:g}"
        held = {index for index, name in enumerate(node.input) if name}
        if lacking := set(self.present) - held:
            return f"not without its input {min(lacking)}"
        if more := held & set(self.absent):
            return f"not with its input {min(more)}"
        variable = [i for i in self.constant if i in held and node.input[i] not in constants]
        return f"its input {variable[0]} is not constant" if variable else ""


class ReaderTable(BaseModel):
    """What a runtime has kernels for.

    Attributes:
        title: the runtime; version: that the table holds for.
        source: of `operators`: by name, for each version of the operator the types of its first input, or any.
        contrib_source: of `contrib`: operators of com.microsoft.
        otherwise: what becomes of other nodes.
        take: what to export for it.
        shapes: whether inputs may have dimensions that vary.
        conditions, notes: by operator; notes are words about what no table can check.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    version: str
    source: str
    contrib_source: str
    otherwise: str
    take: str
    shapes: Literal["any", "fixed"] = "any"
    conditions: Mapping[str, Condition] = {}
    notes: Mapping[str, str] = {}
    contrib: tuple[str, ...]
    operators: Mapping[str, Literal["any"] | Mapping[int, tuple[str, ...]]]


@dataclass(frozen=True)
class Missing:
    """Nodes of a kind that the reader has no kernel for.

    Attributes:
        operator: with its domain where it is not ONNX's own.
        count: of nodes.
        why: what the table lacks.
        example: the name of one.
    """

    operator: str
    count: int
    why: str
    example: str


@dataclass(frozen=True)
class RunsOn:
    """What a reader makes of a file.

    Attributes:
        reader: its name here; title, version, source, otherwise, take: of its table.
        nodes: of the file, constants apart; missing: those without a kernel.
        varying: inputs with dimensions that vary, where the reader wants them fixed.
        notes: by operator of the file that it has a kernel for, what it wants besides.
    """

    reader: str
    title: str
    version: str
    source: str
    otherwise: str
    take: str
    nodes: int
    missing: tuple[Missing, ...]
    varying: tuple[str, ...]
    notes: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def names() -> list[str]:
    """Of the tables there are."""
    return sorted(path.name.removesuffix(".yaml") for path in files(__name__).iterdir() if path.name.endswith(".yaml"))


def table_of(reader: str) -> ReaderTable:
    """The table of a reader.

    Raises:
        InputError: there is none.
    """
    if reader not in names():
        raise InputError(
            f"there is no table of the operators of {reader!r}", place="runs on", remedy=f"Use {' or '.join(names())}"
        )  # fmt: skip
    return ReaderTable.model_validate(yaml.safe_load((files(__name__) / f"{reader}.yaml").read_text("utf-8")))


def runs_on(folder: str | Path, reader: str) -> RunsOn:
    """Say which nodes of an export a runtime has no kernel for.

    Args:
        folder: an exported folder, or an ONNX file.
        reader: a name of `names`.

    Raises:
        InputError: there is no such table, or no such file.
    """
    table, path = table_of(reader), Path(folder)
    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError("there is no model", place=str(path), remedy="Export one with qexport export")
    with reading(path, "cannot be read as ONNX", "Export it again"):
        model = onnx.load(path, load_external_data=False)
    opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 1)
    types, nodes = _types(model), list(_nodes(model.graph))
    constants = {value.name for value in model.graph.initializer} | _made_of_nothing(model.graph)
    found: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for node in nodes:
        if why := _why_missing(table, node, opset, types) or _unmet(table, node, constants):
            key = (node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}", why)
            found[key] += 1
            example.setdefault(key, node.name)
    missing = tuple(Missing(name, count, why, example[name, why]) for (name, why), count in found.most_common())
    known = {node.op_type for node in nodes} - {name.rpartition(".")[2] for name, _ in found}
    return RunsOn(
        reader, table.title, table.version, table.source, table.otherwise, table.take, len(nodes), missing,
        _varying(model.graph) if table.shapes == "fixed" else (),
        {name: note for name, note in table.notes.items() if name in known},
    )  # fmt: skip


def _unmet(table: ReaderTable, node: onnx.NodeProto, constants: Collection[str]) -> str:
    """What a node lacks of the conditions of the table; empty where nothing."""
    condition = table.conditions.get(node.op_type)
    return "" if condition is None else condition.why_not(node, constants)


def _varying(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Inputs with dimensions that are not numbers."""
    given = {value.name for value in graph.initializer}
    return tuple(
        value.name
        for value in graph.input
        if value.name not in given and any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    )


def _made_of_nothing(graph: onnx.GraphProto) -> set[str]:
    """Values of constant nodes."""
    return {name for node in graph.node if node.op_type == "Constant" for name in node.output}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of the graphs within them, constants apart."""
    for node in graph.node:
        if node.op_type != "Constant":
            yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Element types of values by name, as far as ONNX can tell them."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError:  # of operators that nobody imported: what the file says itself is left
        graph = model.graph
    found = {value.name: value.data_type for value in graph.initializer}
    found |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return {name: TensorProto.DataType.Name(kind) for name, kind in found.items() if kind}


def _why_missing(table: ReaderTable, node: onnx.NodeProto, opset: int, types: Mapping[str, str]) -> str:
    """What the table lacks for a node; empty where nothing."""
    if node.domain not in _STANDARD or node.op_type == _OWN:
        known = node.domain in (*_STANDARD, _CONTRIB) and node.op_type in table.contrib
        return "" if known else "no such operator"
    versions = table.operators.get(node.op_type)
    if versions is None:
        return "no such operator"
    if versions == "any":
        return ""
    since = onnx.defs.get_schema(node.op_type, opset, "").since_version
    if since not in versions:
        return f"its version {since} is not among {', '.join(map(str, versions))}"
    kind = types.get(node.input[0]) if node.input else None
    return "" if kind is None or kind in versions[since] else f"not of {kind.lower()}"
