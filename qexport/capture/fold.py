"""Batch norms folded into the convolutions in front of them: what is quantized then is what is computed."""

import operator

import torch
from torch.fx import GraphModule, Node

from ..passes.edit import get_tensor, is_call, set_tensor

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
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
