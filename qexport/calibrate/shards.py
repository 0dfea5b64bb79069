"""A finished block on disk: its tensors in safetensors, its graph as JSON in the file's header.

An interrupted export reads finished blocks back, and the lowering reads their tensors one at a time.
"""

import json
import operator
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.fx import Graph, GraphModule, Node

from ..capture.blocks import Block, holder
from ..errors import InputError
from ..passes.edit import Spec, attributes, get_tensor

_META = ("spec", "module_path", "linear", "result_of", "plane_of", "branch_of", "shares")
_FUNCTIONS = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
}


def save_block(path: Path, block: Block, stored: dict[str, torch.Tensor]) -> None:
    """Write a block; the file appears by rename.

    Args:
        block: its tensors may be on the meta device.
        stored: the tensors that are not in the checkpoint, or not with these values.
    """
    record = {
        "name": block.name, "inputs": block.inputs, "outputs": block.outputs,
        "nodes": [_encode_node(n) for n in block.module.graph.nodes],
        "tensors": {n: _encode(spec) for n, spec in _specs(block.module).items()},
    }  # fmt: skip
    temporary = path.with_suffix(".part")
    save_file({n: t.contiguous() for n, t in stored.items()}, temporary, metadata={"block": json.dumps(record)})
    os.replace(temporary, path)


def load_block(path: Path) -> tuple[Block, set[str]]:
    """Read a block back with meta tensors, and the names of the tensors that its file holds.

    Raises:
        InputError: the file is not such a block.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            record, stored = json.loads(handle.metadata()["block"]), set(handle.keys())
    except Exception as error:
        raise InputError(
            f"is not a finished block ({error})", place=str(path), remedy="Delete the folder and start again"
        ) from error
    graph, env = Graph(), {}
    for item in record["nodes"]:
        node = graph.create_node(
            item["op"], _target(item["op"], item["target"]), tuple(_decode(a, env) for a in item["args"]),
            {k: _decode(v, env) for k, v in item["kwargs"].items()}, name=item["name"],
        )  # fmt: skip
        node.meta = {k: _decode(v, env) for k, v in item["meta"].items()}
        env[item["name"]] = node
    specs = {n: _decode(s, {}) for n, s in record["tensors"].items()}
    module = GraphModule(
        holder({n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in specs.items()}), graph
    )
    return Block(record["name"], module, record["inputs"], record["outputs"], list(specs)), stored


def load_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a finished block."""
    with safe_open(path, framework="pt") as handle:
        return handle.get_tensor(name)


def _specs(module: GraphModule) -> dict[str, Spec]:
    tensors = {name: get_tensor(module, name) for name in attributes(module.graph)}
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def _encode_node(node: Node) -> dict:
    target = node.target if isinstance(node.target, str) else _name_of(node.target)
    return {
        "op": node.op, "name": node.name, "target": target, "args": [_encode(a) for a in node.args],
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        "meta": {k: _encode(node.meta[k]) for k in _META if k in node.meta},
    }  # fmt: skip


def _name_of(target) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{target.__name__}"


def _target(op: str, name: str):
    if op != "call_function":
        return name
    space, rest = name.split(".", 1)
    if space == "operator":
        return _FUNCTIONS[rest]
    packet, overload = rest.rsplit(".", 1)
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _encode(value):
    match value:
        case Node():
            return {"node": value.name}
        case Spec():
            return {"spec": [str(value.dtype), list(value.shape)]}
        case torch.dtype():
            return {"dtype": str(value)}
        case torch.device():
            return {"device": str(value)}
        case tuple() | list():
            return [_encode(v) for v in value]
        case float():
            return {"float": value.hex()}
        case None | bool() | int() | str():
            return value
    raise TypeError(f"cannot store {type(value).__name__}")


def _decode(value, env: dict[str, Node]):
    match value:
        case {"node": name}:
            return env[name]
        case {"spec": [dtype, shape]}:
            return Spec(getattr(torch, dtype.removeprefix("torch.")), tuple(shape))
        case {"dtype": name}:
            return getattr(torch, name.removeprefix("torch."))
        case {"device": name}:
            return torch.device(name)
        case {"float": text}:
            return float.fromhex(text)
        case list():
            return tuple(_decode(v, env) for v in value)
    return value
