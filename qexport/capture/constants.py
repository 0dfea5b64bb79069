"""Values that a model's code computes of constants by functions that no file has: they are computed once."""

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from ..graph.edit import get_tensor, set_tensor
from ..graph.translated import without_form
from ..graph.views import tensor_name

_SMALL = 64  # numbers that such a value may have


def fold_constants(module: GraphModule, weights: Collection[str]) -> None:
    """Replace calls without an ONNX form that depend on constants alone by tensors, in place.

    Args:
        module: its graph in normal form.
        weights: names of the tensors that are no constants: they are not loaded yet.
    """
    for node in without_form(module.graph):
        made = node.meta.get("val")
        if not isinstance(made, torch.Tensor) or made.numel() > _SMALL or not _is_constant(node, weights):
            continue
        with _disable_current_modes(), torch.no_grad():
            value = _value(module, node)
        name = f"constant_{node.name}"
        set_tensor(module, name, value)
        with module.graph.inserting_before(node):
            read = module.graph.get_attr(name)
        read.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(read)
        module.graph.erase_node(node)


def _is_constant(node: Node, weights: Collection[str]) -> bool:
    if node.op == "get_attr":
        return tensor_name(node) not in weights
    operator = node.target
    if node.op != "call_function" or not isinstance(operator, torch._ops.OpOverload) or operator._schema.is_mutable:
        return False
    return bool(node.all_input_nodes) and all(_is_constant(read, weights) for read in node.all_input_nodes)


def _value(module: GraphModule, node: Any) -> Any:
    if node.op == "get_attr":
        return get_tensor(module, tensor_name(node)).detach()
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda read: _value(module, read))
    return node.target(*args, **kwargs)
