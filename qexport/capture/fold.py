"""Convolutions and linears as they are quantized: one weight, which is what is computed, and padding in numbers."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph.convolution_sites import zero_padding
from ..graph.edit import get_tensor, is_call, set_tensor
from ..graph.meta import Meta
from ..graph.schema import bind, rebind
from ..graph.views import Convolution, Item, LinearCall, operand, tensor_name

aten = torch.ops.aten
_BY_NAME: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}  # fmt: skip
_FIRST_OF_SEVERAL = aten._native_batch_norm_legit_no_training.default


def fold_batch_norms(module: GraphModule) -> dict[str, torch.Tensor]:
    """Replace norm(conv(x)) by one convolution, in place, where nothing else reads either of the two.

    Returns:
        The new weights and biases by name; they are tensors of the module too.
    """
    made: dict[str, torch.Tensor] = {}
    for norm in list(module.graph.nodes):
        if not is_call(norm, aten.batch_norm.default, _FIRST_OF_SEVERAL):
            continue
        given, conv = bind(norm), operand(norm)
        parameters = [given.weight, given.bias, given.running_mean, given.running_var]
        results = [norm] if norm.target is aten.batch_norm.default else list(norm.users)
        found = Convolution.match(conv)
        if (
            found is None or len(conv.users) != 1 or not _is_own(found.weight)
            or any(p is not None and p.op != "get_attr" for p in (*parameters, found.bias))
            or any((item := Item.match(r)) is not None and item.index != 0 for r in results)
            or getattr(given, "training", False)
        ):  # fmt: skip
            continue
        name = tensor_name(found.weight)
        bias = f"{name.rpartition('.')[0]}.bias_folded"
        tensors: list[Any] = [_tensor(module, p) for p in (found.weight, found.bias, *parameters)]
        weight, shift = _folded(given.eps, *tensors)
        new = {f"{name}_folded": weight, bias: shift}
        nodes = []
        for key, tensor in new.items():
            set_tensor(module, key, tensor)
            with module.graph.inserting_before(conv):
                node = module.graph.get_attr(key)
            node.meta = {**found.weight.meta, "val": tensor}
            nodes.append(node)
        rebind(conv, weight=nodes[0], bias=nodes[1])
        for result in results:
            result.replace_all_uses_with(conv)
            if result is not norm:
                module.graph.erase_node(result)
        module.graph.erase_node(norm)
        made |= new
    return made


def spell_padding(module: GraphModule) -> None:
    """padding="valid" and padding="same" become numbers, in place; what "same" adds behind alone has a node."""
    for node in module.graph.nodes:
        if not is_call(node, *_BY_NAME):
            continue
        given = bind(node)
        x, same, kernel = given.input, given.padding == "same", given.weight.meta["val"].shape[2:]
        stride, dilation = ([v] * len(kernel) if isinstance(v, int) else v for v in (given.stride, given.dilation))
        wide = [space * (size - 1) if same else 0 for space, size in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in wide):
            more = [pad for total in reversed(wide) for pad in (0, total % 2)]  # of the last axis first
            with module.graph.inserting_before(node):
                x = module.graph.call_function(aten.constant_pad_nd.default, (x, more))
            value = given.input.meta["val"]
            sizes = [size + total % 2 for size, total in zip(value.shape[2:], wide, strict=True)]
            x.meta = {**node.meta, "val": value.new_empty((*value.shape[:2], *sizes))}
        node.target = _BY_NAME[node.target]
        rebind(node, input=x, stride=stride, padding=[total // 2 for total in wide], dilation=dilation)


def fold_padding(module: GraphModule) -> None:
    """Zeros that are added on both sides alike in front of a convolution become its own padding, in place.

    Others stay nodes, as the operator pads both sides alike; ONNX's takes them in.
    """
    for node in list(module.graph.nodes):
        if (found := Convolution.match(node)) is None:
            continue
        rank = len(found.weight.meta["val"].shape) - 2
        more = zero_padding(found.x, rank)
        if more is None or more[0] != more[1]:
            continue
        padding = list(found.padding) * (rank if len(found.padding) == 1 else 1)
        wider = [old + new for old, new in zip(padding, more[0], strict=True)]
        rebind(node, input=operand(found.x), padding=wider)
        if not found.x.users:
            module.graph.erase_node(found.x)


def fold_weights(module: GraphModule) -> dict[str, torch.Tensor]:
    """Replace weights that are made of constants, as parts of others or by a parametrization, by one tensor, in place.

    Returns:
        The new weights and biases by name; they are tensors of the module too.
    """
    sites: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if _is_made(_roles(node).get("weight")):
            owner = node.meta[Meta.MODULE_PATH].partition(".parametrizations.")[0]
            sites.setdefault(owner, []).append(node)
    made: dict[str, torch.Tensor] = {}
    for owner, nodes in sites.items():
        for number, node in enumerate(nodes):
            prefix = ".".join(filter(None, [owner, str(number) if len(nodes) > 1 else ""]))
            for role, old in _roles(node).items():
                if old is not None and _is_made(old):
                    name = f"{prefix}.{role}_folded".removeprefix(".")
                    made[name] = _value(module, old).contiguous()
                    _read(module, node, role, old, name, made[name])
    module.graph.eliminate_dead_code()
    return made


def _tensor(module: GraphModule, node: Node | None) -> Any:
    """The tensor of an argument that is one of the module's; None for an absent one."""
    return None if node is None else get_tensor(module, tensor_name(node)).detach()


def _roles(node: Node) -> dict[str, Node | None]:
    """Weight and bias of a linear or a convolution; nothing for other nodes."""
    found = LinearCall.match(node) or Convolution.match(node)
    return {} if found is None else {"weight": found.weight, "bias": found.bias}


def _is_made(node: Node | None) -> bool:
    """Whether a value is computed, of constants alone."""
    if node is None or node.op != "call_function":
        return False
    return bool(node.all_input_nodes) and all(a.op == "get_attr" or _is_made(a) for a in node.all_input_nodes)


def _value(module: GraphModule, node: Node) -> Any:
    if not callable(node.target):
        return _tensor(module, node)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: _value(module, argument))
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _read(module: GraphModule, node: Node, role: str, old: Node, name: str, tensor: torch.Tensor) -> None:
    """Let a node read a new tensor where it read another value."""
    set_tensor(module, name, tensor)
    with module.graph.inserting_before(node):
        new = module.graph.get_attr(name)
    new.meta = {**old.meta, "val": tensor}
    rebind(node, **{role: new})


def _is_own(weight: Node) -> bool:
    same = [n for n in weight.graph.nodes if n.op == "get_attr" and n.target == weight.target]
    return weight.op == "get_attr" and sum(len(n.users) for n in same) == 1


def _folded(
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [O, ...], the others [O] or None, in float64 and back."""
    factor = (variance.double() + epsilon).rsqrt() * (1 if gain is None else gain.double())
    moved = (-mean.double() if bias is None else bias.double() - mean.double()) * factor
    moved = moved + (0 if shift is None else shift.double())
    wide = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
    return wide.to(weight.dtype), moved.to(weight.dtype)
