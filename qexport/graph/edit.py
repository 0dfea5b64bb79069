"""Small edits of fx graphs that every pass needs.

Every node of a block carries `meta["spec"]`: what is known of its value. Dynamic dimensions are strings.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from .meta import Meta


@dataclass(frozen=True)
class TensorSpec:
    """Type of a value: dtype, and shape with a name for each dynamic dimension. Sizes are int64 scalars of shape ()."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


Spec = TensorSpec | tuple["Spec", ...] | None  # of one tensor, of each of several results, of what is no tensor


def spec_of(value: object) -> Spec:
    """The Spec of a traced value: a tensor, a size, or a tuple of them."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(value.dtype, tuple(d if isinstance(d, int) else str(d) for d in value.shape))
    if isinstance(value, (int, torch.SymInt)):
        return TensorSpec(torch.int64, ())
    if isinstance(value, (tuple, list)):
        return tuple(spec_of(v) for v in value)
    return None


def tensor_spec(node: Node) -> TensorSpec:
    """Type of a node's value, which is one tensor or a size."""
    return cast(TensorSpec, node.meta[Meta.SPEC])


def shape_of(node: Node) -> tuple[int | str, ...]:
    """Shape of a node's value."""
    return tensor_spec(node).shape


def dtype_of(node: Node) -> torch.dtype:
    """Dtype of a node's value."""
    return tensor_spec(node).dtype


def call(graph: Graph, target: Any, args: tuple[Any, ...], like: Node, **changes: Any) -> Node:
    """Insert a call whose value has the type of `like`, except for the given `dtype` or `shape`."""
    node = graph.call_function(target, args)
    spec, path = replace(tensor_spec(like), **changes), like.meta.get(Meta.MODULE_PATH, "")
    node.meta = {Meta.SPEC: spec, Meta.MODULE_PATH: path}
    return node


def is_call(node: object, *targets: Any) -> TypeGuard[Node]:
    """Whether `node` is a call of one of the operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def owner_of(tensor: str) -> str:
    """The path of the module that owns a tensor, by its dotted name; "root" stands for the model itself.

    Tensors that passes add are named after their layer, so no layer can be called as a tensor is.
    """
    path, _, leaf = tensor.rpartition(".")
    return path or ("root" if leaf == "weight" else f"root.{leaf}")


def get_tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor at a dotted name."""
    found: Any = module
    for step in name.split("."):
        found = getattr(found, step)
    return cast(torch.Tensor, found)


def set_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the buffer `name` (dotted) of `module`, creating the modules on the way."""
    *path, leaf = name.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, torch.nn.Module())
        module = getattr(module, step)
    for place in (module._parameters, module._buffers, module.__dict__):
        place.pop(leaf, None)
    module.register_buffer(leaf, tensor.detach())


def delete_tensor(module: torch.nn.Module, name: str) -> None:
    """Remove the buffer `name`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    del owner._buffers[leaf]


def module_of(graph: Graph, tensors: dict[str, torch.Tensor], name: str = "Block") -> GraphModule:
    """A module that runs a graph on the given tensors, which become its buffers under their dotted names.

    Its code is generated when it is called first after an edit: most edits are followed by others.

    Args:
        name: of its class.
    """
    root = torch.nn.Module()
    for path, tensor in tensors.items():
        set_tensor(root, path, tensor)
    return _LazyGraphModule(root, graph, class_name=name)


def tensors_of(module: GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that its graph reads, by name."""
    return {name: get_tensor(module, name) for name in attributes(module.graph)}


def copy_of(module: GraphModule, tensors: dict[str, torch.Tensor]) -> GraphModule:
    """A module with a graph of its own that does the same on the given tensors."""
    return module_of(deepcopy(module.graph), tensors, type(module).__name__)


def add_tensor(graph: Graph, name: str, tensor: torch.Tensor) -> Node:
    """A get_attr node for a tensor, which becomes a buffer of the graph's module."""
    if graph.owning_module is None:
        raise TypeError("a graph without a module has no tensors")
    set_tensor(graph.owning_module, name, tensor)
    node = graph.get_attr(name)
    node.meta[Meta.SPEC] = spec_of(tensor)
    return node


def attributes(graph: Graph) -> list[str]:
    """Names of all tensors that the graph reads."""
    return list(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"))


def finish(module: GraphModule) -> None:
    """After an edit: drop what is dead, tensors too, check the graph, and let go of the code made from it."""
    before = set(attributes(module.graph))
    module.graph.eliminate_dead_code()
    for name in before - set(attributes(module.graph)):
        delete_tensor(module, name)
    module.graph.lint()
    module.recompile()
