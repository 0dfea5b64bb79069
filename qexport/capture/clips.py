"""One spelling for clips, of which libraries have a dozen: x.relu() where only what is below 0 is cut, else x.clamp().

Ranges of activations end where a clip ends, and ONNX Runtime takes a clip into the rounding behind it: whoever looks
for one finds it by two operators.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.edit import get_tensor, is_call
from ..graph.schema import Arguments, bind
from ..graph.views import Add, Clamp, Div, Mul, Operand, operand, tensor_name

aten = torch.ops.aten
Bounds = tuple[float | None, float | None]

_UNKNOWN = math.nan
_FILLED: dict[Any, Callable[[Arguments], Any]] = {
    aten.full.default: lambda given: given.fill_value, aten.full_like.default: lambda given: given.fill_value,
    aten.new_full.default: lambda given: given.fill_value, aten.scalar_tensor.default: lambda given: given.s,
    aten.zeros.default: lambda given: 0.0, aten.zeros_like.default: lambda given: 0.0,
    aten.new_zeros.default: lambda given: 0.0, aten.ones.default: lambda given: 1.0,
    aten.ones_like.default: lambda given: 1.0, aten.new_ones.default: lambda given: 1.0,
}  # fmt: skip
_CLIPS: dict[Any, Callable[[Arguments], tuple[Any, Any]]] = {
    aten.relu.default: lambda given: (0.0, None), aten.relu6.default: lambda given: (0.0, 6.0),
    aten.hardtanh.default: lambda given: (given.min_val, given.max_val),
    # Every value that is not above the threshold becomes another.
    aten.threshold.default: lambda given: (given.threshold if given.threshold == given.value else _UNKNOWN, None),
    aten.clamp.default: lambda given: (given.min, given.max), aten.clip.default: lambda given: (given.min, given.max),
    aten.clamp.Tensor: lambda given: (given.min, given.max), aten.clip.Tensor: lambda given: (given.min, given.max),
    aten.clamp_min.default: lambda given: (given.min, None), aten.clamp_min.Tensor: lambda given: (given.min, None),
    aten.clamp_max.default: lambda given: (None, given.max), aten.clamp_max.Tensor: lambda given: (None, given.max),
}  # fmt: skip
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
        given = bind(node)
        x, bound = given.self, given.other
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
    bounds = _value(module, low), _value(module, high)
    unknown = any(b is not None and v is None for b, v in zip((low, high), bounds, strict=True))
    if unknown or bounds == (None, None) or x.meta["val"].shape != node.meta["val"].shape:
        return None
    return x, bounds


def _value(module: GraphModule, bound: Operand | None) -> float | None:
    """The number that a bound is everywhere; None where it is not known, or a parameter that weights may change."""
    if isinstance(bound, (int, float)):
        return None if math.isnan(bound) else float(bound)
    if not isinstance(bound, Node):
        return None
    if bound.target in _FILLED:
        number = _FILLED[bound.target](bind(bound))
        return float(number) if isinstance(number, (int, float)) else None
    if bound.op != "get_attr":
        return None
    tensor = get_tensor(module, tensor_name(bound))
    real = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.numel() == 1
    return float(tensor) if real and not math.isnan(float(tensor)) else None


def _spell(graph: Graph, node: Node, x: Node, bounds: Bounds) -> None:
    before = None
    if (inner := _spelled(x)) is not None and len(x.users) == 1:
        before, x, bounds = x, operand(x), _composed(inner, bounds)
    low, high = bounds
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


def _spelled(node: Node) -> Bounds | None:
    """The bounds of a clip that is spelled already."""
    if is_call(node, aten.relu.default):
        return 0.0, None
    clip = Clamp.match(node)
    return None if clip is None or isinstance(clip.low, Node) or isinstance(clip.high, Node) else (clip.low, clip.high)


def _composed(inner: Bounds, outer: Bounds) -> Bounds:
    """The bounds of the one clip that two in turn are."""
    found: list[float | None] = []
    for bound, open_end in zip(inner, (-math.inf, math.inf), strict=True):
        value = open_end if bound is None else bound
        value = value if outer[0] is None else max(value, outer[0])
        value = value if outer[1] is None else min(value, outer[1])
        found.append(None if math.isinf(value) else value)
    low, high = found
    return low, high


def _spell_hard(graph: Graph, node: Node) -> None:
    """clamp(x + 3, 0, 6) / 6 becomes hardsigmoid(x), and times x hardswish(x)."""
    x = _hard_sigmoid(node)
    target = aten.hardswish.default if x is None else aten.hardsigmoid.default
    if x is None:
        x = _hard_swish(node)
    if x is None or x.meta["val"].dtype != node.meta["val"].dtype:
        return
    with graph.inserting_before(node):
        new = graph.call_function(target, (x,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _hard_sigmoid(node: Node) -> Node | None:
    sixth = _sixth(node)
    return None if sixth is None else _shifted_clip(sixth)


def _hard_swish(node: Node) -> Node | None:
    """x of x * hardsigmoid(x), x * clamp(x + 3, 0, 6) / 6 or x / 6 * clamp(x + 3, 0, 6)."""
    whole = _sixth(node)
    if (product := Mul.match(node if whole is None else whole)) is None:
        return None
    for one, other in (product.operands, product.operands[::-1]):
        if not isinstance(one, Node) or not isinstance(other, Node):
            continue
        if whole is not None and _shifted_clip(other) is one:
            return one
        if whole is None and is_call(other, aten.hardsigmoid.default) and operand(other) is one:
            return one
        if whole is None and (sixth := _sixth(one)) is not None and _shifted_clip(other) is sixth:
            return sixth
    return None


def _sixth(node: Node) -> Node | None:
    """x of x / 6, in either spelling."""
    if (quotient := Div.match(node)) is not None:
        return quotient.x if quotient.other == 6 else None
    product = Mul.match(node)
    if product is None or not isinstance(product.other, float):
        return None
    return product.x if math.isclose(product.other, 1 / 6, rel_tol=1e-7) else None


def _shifted_clip(node: Node) -> Node | None:
    """x of clamp(x + 3, 0, 6)."""
    clip = Clamp.match(node)
    if clip is None or (clip.low, clip.high) != (0.0, 6.0):
        return None
    shifted = Add.match(clip.x)
    if shifted is None or shifted.alpha != 1:
        return None
    x, number = shifted.operands if isinstance(shifted.x, Node) else shifted.operands[::-1]
    return x if isinstance(x, Node) and not isinstance(number, Node) and number == 3 else None
