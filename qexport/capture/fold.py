"""Convolutions and linears as they are quantized: one weight, which is what is computed, and padding in numbers."""

import operator

import torch
from torch.fx import GraphModule, Node

from ..graph.convolution_sites import CONVOLUTIONS, zero_padding
from ..graph.edit import get_tensor, is_call, set_tensor

aten = torch.ops.aten
_BY_NAME = {
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
        conv, parameters = norm.args[0], norm.args[1:5]
        results = [norm] if norm.target is aten.batch_norm.default else list(norm.users)
        if (
            not is_call(conv, *CONVOLUTIONS) or len(conv.users) != 1 or not _is_own(conv.args[1])
            or any(p is not None and p.op != "get_attr" for p in (*parameters, *conv.args[2:3]))
            or any(is_call(r, operator.getitem) and r.args[1] != 0 for r in results)
            or (norm.target is aten.batch_norm.default and norm.args[5])
        ):  # fmt: skip
            continue
        name = conv.args[1].target
        bias = f"{name.rpartition('.')[0]}.bias_folded"
        tensors = [None if p is None else get_tensor(module, p.target).detach() for p in (*conv.args[1:3], *parameters)]
        if len(conv.args) < 3:
            tensors.insert(1, None)
        epsilon = norm.args[7] if norm.target is aten.batch_norm.default else norm.args[6]
        weight, shift = _folded(*tensors, epsilon)
        new = {f"{name}_folded": weight, bias: shift}
        nodes = []
        for key, tensor in new.items():
            set_tensor(module, key, tensor)
            with module.graph.inserting_before(conv):
                node = module.graph.get_attr(key)
            node.meta = {**conv.args[1].meta, "val": tensor}
            nodes.append(node)
        conv.args = (conv.args[0], *nodes, *conv.args[3:])
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
        x, weight, bias, stride, padding, dilation, groups = (
            *node.args,
            *(None, 1, "valid", 1, 1)[len(node.args) - 2 :],
        )
        kernel = weight.meta["val"].shape[2:]
        stride, dilation = ([v] * len(kernel) if isinstance(v, int) else v for v in (stride, dilation))
        wide = [space * (size - 1) if padding == "same" else 0 for space, size in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in wide):
            more = [pad for total in reversed(wide) for pad in (0, total % 2)]  # of the last axis first
            with module.graph.inserting_before(node):
                x = module.graph.call_function(aten.constant_pad_nd.default, (x, more))
            value = node.args[0].meta["val"]
            sizes = [size + total % 2 for size, total in zip(value.shape[2:], wide, strict=True)]
            x.meta = {**node.meta, "val": value.new_empty((*value.shape[:2], *sizes))}
        node.target = _BY_NAME[node.target]
        node.args = (x, weight, bias, stride, [total // 2 for total in wide], dilation, groups)


def fold_padding(module: GraphModule) -> None:
    """Zeros that are added on both sides alike in front of a convolution become its own padding, in place.

    Others stay nodes, as the operator pads both sides alike; ONNX's takes them in.
    """
    for node in list(module.graph.nodes):
        if not is_call(node, *CONVOLUTIONS):
            continue
        x, rank = node.args[0], len(node.args[1].meta["val"].shape) - 2
        more = zero_padding(x, rank)
        if more is None or more[0] != more[1]:
            continue
        bias, stride, padding, *rest = (*node.args[2:], *(None, [1] * rank, [0] * rank)[len(node.args) - 2 :])
        padding = list(padding) * (rank if len(padding) == 1 else 1)
        wider = [old + new for old, new in zip(padding, more[0], strict=True)]
        node.args = (x.args[0], node.args[1], bias, stride, wider, *rest)
        if not x.users:
            module.graph.erase_node(x)


def fold_weights(module: GraphModule) -> dict[str, torch.Tensor]:
    """Replace weights that are made of constants, as parts of others or by a parametrization, by one tensor, in place.

    Returns:
        The new weights and biases by name; they are tensors of the module too.
    """
    sites: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if is_call(node, aten.linear.default, *CONVOLUTIONS) and _is_made(node.args[1]):
            owner = node.meta["module_path"].partition(".parametrizations.")[0]
            sites.setdefault(owner, []).append(node)
    made: dict[str, torch.Tensor] = {}
    for owner, nodes in sites.items():
        for number, node in enumerate(nodes):
            prefix = ".".join(filter(None, [owner, str(number) if len(nodes) > 1 else ""]))
            for index, role in ((1, "weight"), (2, "bias")):
                if len(node.args) > index and _is_made(node.args[index]):
                    name = f"{prefix}.{role}_folded".removeprefix(".")
                    made[name] = _value(module, node.args[index]).contiguous()
                    _read(module, node, index, name, made[name])
    module.graph.eliminate_dead_code()
    return made


def _is_made(node: Node | None) -> bool:
    """Whether a value is computed, of constants alone."""
    if node is None or node.op != "call_function":
        return False
    return bool(node.all_input_nodes) and all(a.op == "get_attr" or _is_made(a) for a in node.all_input_nodes)


def _value(module: GraphModule, node: Node):
    if node.op == "get_attr":
        return get_tensor(module, node.target).detach()
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: _value(module, argument))
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _read(module: GraphModule, node: Node, index: int, name: str, tensor: torch.Tensor) -> None:
    """Let a node read a new tensor as one of its arguments."""
    set_tensor(module, name, tensor)
    with module.graph.inserting_before(node):
        new = module.graph.get_attr(name)
    new.meta = {**node.args[index].meta, "val": tensor}
    node.update_arg(index, new)


def _is_own(weight: Node) -> bool:
    same = [n for n in weight.graph.nodes if n.op == "get_attr" and n.target == weight.target]
    return weight.op == "get_attr" and sum(len(n.users) for n in same) == 1


def _folded(weight, bias, gain, shift, mean, variance, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [O, ...], the others [O] or None, in float64 and back."""
    factor = (variance.double() + epsilon).rsqrt() * (1 if gain is None else gain.double())
    moved = ((0 if bias is None else bias.double()) - mean.double()) * factor
    moved = moved + (0 if shift is None else shift.double())
    wide = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
    return wide.to(weight.dtype), moved.to(weight.dtype)
