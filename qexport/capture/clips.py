"""One spelling for clips, of which libraries have a dozen: x.relu() where only what is below 0 is cut, else x.clamp().

Ranges of activations end where a clip ends, and ONNX Runtime takes a clip into the rounding behind it: whoever looks
for one finds it by two operators.
"""

import math

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.edit import get_tensor, is_call
from ..graph.schema import bind

aten = torch.ops.aten
Bounds = tuple[float | None, float | None]

_FILLED = {
    aten.full.default: lambda node: node.args[1], aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2], aten.scalar_tensor.default: lambda node: node.args[0],
    aten.zeros.default: lambda node: 0.0, aten.zeros_like.default: lambda node: 0.0,
    aten.new_zeros.default: lambda node: 0.0, aten.ones.default: lambda node: 1.0,
    aten.ones_like.default: lambda node: 1.0, aten.new_ones.default: lambda node: 1.0,
}  # fmt: skip
_CLIPS = {
    aten.relu.default: lambda given: (0.0, None), aten.relu6.default: lambda given: (0.0, 6.0),
    aten.hardtanh.default: lambda given: (given.min_val, given.max_val),
    # Every value that is not above the threshold becomes another.
    aten.threshold.default: lambda given: (given.threshold if given.threshold == given.value else _UNKNOWN, None),
    aten.clamp.default: lambda given: (given.min, given.max), aten.clip.default: lambda given: (given.min, given.max),
    aten.clamp.Tensor: lambda given: (given.min, given.max), aten.clip.Tensor: lambda given: (given.min, given.max),
    aten.clamp_min.default: lambda given: (given.min, None), aten.clamp_min.Tensor: lambda given: (given.min, None),
    aten.clamp_max.default: lambda given: (None, given.max), aten.clamp_max.Tensor: lambda given: (None, given.max),
}  # fmt: skip
_UNKNOWN = math.nan
_LARGER, _SMALLER = (aten.maximum.default, aten.max.other), (aten.minimum.default, aten.min.other)


def spell_clips(module: GraphModule) -> None:
    """Write every clip of floats to constants as relu(x) or clamp(x, low, high), and a clip of a clip as one, in place.

    hardsigmoid and hardswish made of a clip become these operators.
    """
    graph = module.graph
    for node in list(graph.nodes):
        found = _match_clip(module, node)
        if found is not None:
            _spell(graph, node, *found)
    for node in list(graph.nodes):
        _spell_hard(graph, node)


def _match_clip(module: GraphModule, node: Node) -> tuple[Node, Bounds] | None:
    """(x, bounds) of a node that clips x."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if not node.meta["val"].is_floating_point():
        return None
    if is_call(node, *_LARGER, *_SMALLER):
        x, bound = node.args[:2]
        if _value(module, x) is not None:
            x, bound = bound, x
        value = _value(module, bound)
        # The other side may be the wider one, of shape or dtype.
        same = value is not None and x.meta["val"].shape == node.meta["val"].shape
        if not same or x.meta["val"].dtype != node.meta["val"].dtype:
            return None
        return x, ((value, None) if is_call(node, *_LARGER) else (None, value))
    if node.target not in _CLIPS:
        return None
    given = bind(node)
    x, (low, high) = given.self, _CLIPS[node.target](given)
    bounds = tuple(None if b is None else _value(module, b) for b in (low, high))
    unknown = any(b is not None and v is None for b, v in zip((low, high), bounds, strict=True))
    if unknown or bounds == (None, None) or x.meta["val"].shape != node.meta["val"].shape:
        return None
    return x, bounds


def _value(module: GraphModule, bound) -> float | None:
    """The number that a bound is everywhere; None where it is not known, or a parameter that weights may change."""
    if isinstance(bound, (int, float)):
        return None if math.isnan(bound) else float(bound)
    if not isinstance(bound, Node):
        return None
    if bound.target in _FILLED:
        number = _FILLED[bound.target](bound)
        return float(number) if isinstance(number, (int, float)) else None
    if bound.op != "get_attr":
        return None
    tensor = get_tensor(module, bound.target)
    real = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.numel() == 1
    return float(tensor) if real and not math.isnan(float(tensor)) else None


def _spell(graph: Graph, node: Node, x: Node, bounds: Bounds) -> None:
    (low, high), before = bounds, None
    if is_call(x, aten.relu.default, aten.clamp.default) and len(x.users) == 1:  # spelled already
        before = x
        low, high = _composed((0.0, None) if is_call(x, aten.relu.default) else x.args[1:], bounds)
        x = x.args[0]
    relu = low == 0 and high is None
    with graph.inserting_before(node):
        new = graph.call_function(aten.relu.default, (x,)) if relu else graph.call_function(
            aten.clamp.default, (x, low, high)
        )  # fmt: skip
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if before is not None:
        graph.erase_node(before)


def _composed(inner: Bounds, outer: Bounds) -> Bounds:
    """The bounds of the one clip that two in turn are."""
    found = []
    for bound, open_end in zip(inner, (-math.inf, math.inf), strict=True):
        value = open_end if bound is None else bound
        value = value if outer[0] is None else max(value, outer[0])
        value = value if outer[1] is None else min(value, outer[1])
        found.append(None if math.isinf(value) else value)
    return tuple(found)


def _spell_hard(graph: Graph, node: Node) -> None:
    """clamp(x + 3, 0, 6) / 6 becomes hardsigmoid(x), and times x hardswish(x)."""
    target, x = aten.hardsigmoid.default, _hard_sigmoid(node)
    if x is None:
        target, x = aten.hardswish.default, _hard_swish(node)
    if x is None or x.meta["val"].dtype != node.meta["val"].dtype:
        return
    with graph.inserting_before(node):
        new = graph.call_function(target, (x,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _hard_sigmoid(node: Node) -> Node | None:
    return _shifted_clip(node.args[0]) if _is_sixth(node) else None


def _hard_swish(node: Node) -> Node | None:
    """x of x * hardsigmoid(x), x * clamp(x + 3, 0, 6) / 6 or x / 6 * clamp(x + 3, 0, 6)."""
    product = node.args[0] if _is_sixth(node) else node
    if not is_call(product, aten.mul.Tensor):
        return None
    for one, other in (product.args[:2], product.args[1::-1]):
        if not isinstance(one, Node) or not isinstance(other, Node):
            continue
        if product is not node and _shifted_clip(other) is one:
            return one
        if product is node and is_call(other, aten.hardsigmoid.default) and other.args[0] is one:
            return one
        if product is node and _is_sixth(one) and _shifted_clip(other) is one.args[0]:
            return one.args[0]
    return None


def _is_sixth(node: Node) -> bool:
    """Whether a node is something over 6."""
    if len(getattr(node, "args", ())) < 2 or not isinstance(node.args[0], Node):
        return False
    number = node.args[1]
    if is_call(node, aten.div.Tensor):
        return number == 6 and not node.kwargs
    return is_call(node, aten.mul.Tensor) and isinstance(number, float) and math.isclose(number, 1 / 6, rel_tol=1e-7)


def _shifted_clip(node: Node) -> Node | None:
    """x of clamp(x + 3, 0, 6)."""
    if not is_call(node, aten.clamp.default) or tuple(node.args[1:]) != (0.0, 6.0):
        return None
    shifted = node.args[0]
    if not is_call(shifted, aten.add.Tensor) or shifted.kwargs:
        return None
    x, number = shifted.args[:2] if isinstance(shifted.args[0], Node) else shifted.args[1::-1]
    return x if isinstance(x, Node) and not isinstance(number, Node) and number == 3 else None
