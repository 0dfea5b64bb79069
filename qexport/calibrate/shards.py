"""A finished block on disk: its tensors in safetensors, its graph as JSON in the file's header.

An interrupted export reads finished blocks back, and the lowering reads their tensors one at a time. Everything that
passes noted at a node is kept: what has no form here is an error when it is written, not missing when it is read.
"""

import json
import math
import operator
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.fx import Graph, GraphModule, Node

from ..capture.blocks import Block
from ..errors import InputError, PassError, writing_to
from ..graph.edit import TensorSpec, module_of, tensors_of

_MODULES = {"_operator": operator, "operator": operator, "math": math, "torch": torch}  # of plain functions in graphs
_PLAIN = "python:"  # before the name of one


def save_block(path: Path, block: Block, stored: dict[str, torch.Tensor], run: str) -> None:
    """Write a block; the file appears by rename.

    Args:
        block: its tensors may be on the meta device.
        stored: the tensors that are not in the checkpoint, or not with these values.
        run: who writes it, which `load_block` and `load_tensor` want to see again.

    Raises:
        PassError: a node has arguments or metadata that cannot be kept.
        InputError: the disk is full.
    """
    record, temporary = record_of(block), path.with_suffix(".part")
    with writing_to(path, "Free some space; --resume goes on from there"):
        tensors = {n: t.contiguous() for n, t in stored.items()}
        save_file(tensors, temporary, metadata={"block": json.dumps(record), "run": run})
        os.replace(temporary, path)


def record_of(block: Block) -> dict:
    """A block without the values of its tensors, in the types of JSON; raises PassError as `save_block` does."""
    return {
        "name": block.name, "inputs": block.inputs, "outputs": block.outputs,
        "nodes": [_encode_node(n) for n in block.module.graph.nodes],
        "tensors": {n: _encode(spec) for n, spec in _specs(block.module).items()},
    }  # fmt: skip


def load_block(path: Path, run: str) -> tuple[Block, set[str]]:
    """Read a block back with meta tensors, and the names of the tensors that its file holds.

    Raises:
        InputError: the file is not such a block, or another run wrote it.
    """
    with _opened(path, run) as handle:
        record, stored = json.loads(handle.metadata()["block"]), set(handle.keys())
    graph = Graph()
    env: dict[str, Node] = {}
    for item in record["nodes"]:
        node = graph.create_node(
            item["op"], _target(item["op"], item["target"]), tuple(_decode(a, env) for a in item["args"]),
            {k: _decode(v, env) for k, v in item["kwargs"].items()}, name=item["name"],
        )  # fmt: skip
        env[item["name"]] = node
    for item in record["nodes"]:  # what is noted may name any node
        env[item["name"]].meta = {k: _decode(v, env) for k, v in item["meta"].items()}
    specs = {n: _decode(s, {}) for n, s in record["tensors"].items()}
    tensors = {n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in specs.items()}
    module = module_of(graph, tensors)
    return Block(record["name"], module, record["inputs"], record["outputs"], list(specs)), stored


def load_tensor(path: Path, name: str, run: str) -> torch.Tensor:
    """One tensor of a finished block; raises as `load_block`."""
    with _opened(path, run) as handle:
        return handle.get_tensor(name)


@contextmanager
def _opened(path: Path, run: str):
    try:
        with safe_open(path, framework="pt") as handle:
            if handle.metadata()["run"] != run:
                raise InputError(
                    "was written by another export", place=str(path), remedy="Export without --resume to start again"
                )
            yield handle
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"is not a finished block ({error})", place=str(path), remedy="Export without --resume to start again"
        ) from error


def _specs(module: GraphModule) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors_of(module).items()}


def _encode_node(node: Node) -> dict:
    target = node.target if isinstance(node.target, str) else _name_of(node.target)
    part = ""
    try:
        part = "an argument"
        given = {"args": [_encode(a) for a in node.args], "kwargs": {k: _encode(v) for k, v in node.kwargs.items()}}
        meta = {}
        for key, value in node.meta.items():
            part = f"the metadata {str(key)!r}"
            meta[str(key)] = _encode(value)
    except TypeError as error:
        raise PassError(
            f"{part} of a node is a {error}, which a finished block cannot keep", place=node.name,
            remedy="Passes note numbers, text, dtypes, nodes, and tuples and dicts of them",
        ) from None  # fmt: skip
    return {"op": node.op, "name": node.name, "target": target, "meta": meta, **given}


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    if getattr(_MODULES.get(str(module)), name, None) is not target:
        raise PassError(
            f"calls {target}, which a finished block cannot keep", place=str(module),
            remedy="Register it as an operator",
        )  # fmt: skip
    return f"{_PLAIN}{module}.{name}"


def _target(op: str, name: str):
    if op != "call_function":
        return name
    if name.startswith(_PLAIN):
        module, name = name.removeprefix(_PLAIN).split(".")
        return getattr(_MODULES[module], name)
    space, rest = name.split(".", 1)
    packet, overload = rest.rsplit(".", 1)
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _encode(value):
    match value:
        case Node():
            return {"node": value.name}
        case TensorSpec():
            return {"spec": [str(value.dtype), list(value.shape)]}
        case torch.dtype():
            return {"dtype": str(value)}
        case torch.device():
            return {"device": str(value)}
        case dict():
            return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
        case tuple() | list():
            return [_encode(v) for v in value]
        case float():
            return {"float": value.hex()}
        case None | bool() | int() | str():
            return value
    raise TypeError(type(value).__name__)


def _decode(value, env: dict[str, Node]):
    match value:
        case {"node": name}:
            return env[name]
        case {"spec": [dtype, shape]}:
            return TensorSpec(getattr(torch, dtype.removeprefix("torch.")), tuple(shape))
        case {"dtype": name}:
            return getattr(torch, name.removeprefix("torch."))
        case {"device": name}:
            return torch.device(name)
        case {"dict": items}:
            return {_decode(k, env): _decode(v, env) for k, v in items}
        case {"float": text}:
            return float.fromhex(text)
        case list():
            return tuple(_decode(v, env) for v in value)
    return value
