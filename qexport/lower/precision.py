"""A float32 graph turned into a float16 or bfloat16 one.

Values computed from integers and constants alone (positions, rotary tables, masks) stay float32 until they meet the
activations: positions beyond 2048 (256 in bfloat16) and their angles do not fit. So do nodes marked KEEP_FLOAT32, and
those without a bfloat16 kernel. Casts appear where the two meet, in the graph itself, so that PyTorch and ONNX Runtime
cast at the same places. The lowest float32, which masks are made of, becomes the lowest of the smaller type: rounded
it would be minus infinity, and a row of nothing else has no softmax.
"""

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from ..graph.edit import Spec, TensorSpec, call, finish, get_tensor, is_call, set_tensor
from ..graph.meta import Meta
from ..graph.schema import bind, rebind
from ..graph.views import Item, tensor_name
from ..quant.float_types import FLOAT_TYPES
from ..quant.narrowing import narrowed

aten = torch.ops.aten
ops = torch.ops.qexport
_SAME_TYPE = (aten.sym_size.int, operator.getitem)  # take whatever type their input has


def to_half(module: GraphModule, constants: set[str], half: torch.dtype) -> None:
    """Make a block compute in `half`, in place.

    Args:
        module: a float32 block.
        constants: names of its tensors that come from the config and not from the checkpoint.
        half: float16 or bfloat16.
    """
    graph = module.graph
    single = _stays_single(graph, constants)
    if half == torch.bfloat16:  # what reads these has kernels again
        for node in graph.nodes:
            item = Item.match(node)
            if is_call(node, *IN_FLOAT32) or (item is not None and item.source in single):
                single.add(node)
    for node in list(graph.nodes):
        if is_call(node, aten.softmax.int) and node not in single:
            rebind(node, dtype=None)  # without the float32 that a router may ask for
        if node.op == "get_attr" and _is_float(node) and node not in single:
            name = tensor_name(node)
            set_tensor(module, name, narrowed(get_tensor(module, name), half, name))
        if node.op != "output" and node not in single:
            node.meta[Meta.SPEC] = _halved(node.meta[Meta.SPEC], half)
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    far = _far_values(graph, half, single)
    for node in list(graph.nodes):
        if node in far and node not in single:
            _bring_near(node, half)
        if node.op not in ("call_function", "output") or node.target in _SAME_TYPE:
            continue
        wants = torch.float32 if node in single else half
        for source in node.all_input_nodes:
            if source in _exact_scales(node):
                continue
            if _is_float(source) and source.meta[Meta.SPEC].dtype != wants:
                near = _clamped(graph, source, half, casts) if source in far and wants == half else source
                node.replace_input_with(source, _cast(graph, near, wants, casts))
    finish(module)


def _stays_single(graph: Graph, constants: set[str]) -> set[Node]:
    single: set[Node] = set()
    readers: dict[str, list[tuple[Node, Node]]] = {}  # of a tensor, by whichever of the nodes that stand for it
    for node in graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(tensor_name(node), []).extend((node, user) for user in node.users)
    for node in graph.nodes:
        if node.op == "get_attr" and _is_float(node):
            read = readers[tensor_name(node)]
            exact = (Meta.KEEP_FLOAT32 in user.meta or by in _exact_scales(user) for by, user in read)
            if node.target in constants or all(exact):
                single.add(node)
        elif node.op == "call_function" and (
            Meta.KEEP_FLOAT32 in node.meta or all(s in single for s in node.all_input_nodes if _is_float(s))
        ):
            single.add(node)
    return single


def _far_values(graph: Graph, half: torch.dtype, single: set[Node]) -> set[Node]:
    """Nodes that are given a finite number beyond the smaller type, and what float32 constants and masks hold of it.

    Infinity is not among them: whoever wrote it meant it.
    """
    far: set[Node] = set()
    for node in graph.nodes:
        follows = node in single and Meta.KEEP_FLOAT32 not in node.meta and _is_float(node)
        if node.op == "call_function" and (
            _far_numbers(node, half) or (follows and far.intersection(node.all_input_nodes))
        ):
            far.add(node)
    return far


def _far_numbers(node: Node, half: torch.dtype) -> bool:
    found: list[float] = []
    map_aggregate((node.args, node.kwargs), lambda a: found.append(a) if isinstance(a, float) else None)
    return any(math.isfinite(number) and abs(number) > torch.finfo(half).max for number in found)


def _bring_near(node: Node, half: torch.dtype) -> None:
    most = torch.finfo(half).max

    def near(argument: Any) -> Any:
        fits = not isinstance(argument, float) or not math.isfinite(argument)
        return argument if fits else min(max(argument, -most), most)

    node.args, node.kwargs = map_aggregate(node.args, near), map_aggregate(node.kwargs, near)


def _clamped(graph: Graph, source: Node, half: torch.dtype, casts: dict[tuple[Node, torch.dtype], Node]) -> Node:
    """A float32 value within the smaller type; infinity, too, becomes its lowest or highest number."""
    if (source, torch.float32) not in casts:
        most = torch.finfo(half).max
        with graph.inserting_after(source):
            casts[source, torch.float32] = call(graph, aten.clamp.default, (source, -most, most), like=source)
    return casts[source, torch.float32]


def _exact_scales(node: Node) -> tuple[Node | None, ...]:
    """What a node reads in float32 whatever its own type: the scales of a cache of codes, and of small floats."""
    if is_call(node, ops.grouped_attention.default):
        given = bind(node)
        return given.key_scale, given.value_scale
    if is_call(node, ops.matmul_floats.default):
        given = bind(node)
        return given.scale, given.tensor_scale, given.input_scale
    if is_call(node, ops.quantized_experts.default):
        given = bind(node)
        return *given.up_wholes, *given.down_wholes
    return ()


def _cast(graph: Graph, source: Node, dtype: torch.dtype, casts: dict[tuple[Node, torch.dtype], Node]) -> Node:
    if (source, dtype) not in casts:
        with graph.inserting_after(source):
            casts[source, dtype] = call(graph, aten.to.dtype, (source, dtype), like=source, dtype=dtype)
    return casts[source, dtype]


def _is_float(node: Node) -> bool:
    spec = node.meta.get(Meta.SPEC)
    specs = spec if isinstance(spec, tuple) else (spec,)
    return any(isinstance(s, TensorSpec) and s.dtype in FLOAT_TYPES for s in specs)


def _halved(spec: Spec, half: torch.dtype) -> Spec:
    if isinstance(spec, tuple):
        return tuple(_halved(s, half) for s in spec)
    return replace(spec, dtype=half) if spec is not None and spec.dtype == torch.float32 else spec


# Their ONNX forms: Clip, Min, ReduceMax, Log, Reciprocal, Round, TopK, and comparisons.
IN_FLOAT32 = frozenset({
    aten.clamp.default, aten.clamp_min.default, aten.amax.default, aten.log.default, aten.reciprocal.default,
    aten.rsqrt.default, aten.round.default, aten.topk.default, aten.max.dim, ops.highest.default, aten.le.Tensor,
    aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor, aten.eq.Tensor, aten.le.Scalar, aten.lt.Scalar, aten.ge.Scalar,
    aten.gt.Scalar, aten.eq.Scalar, aten.prelu.default,
})  # fmt: skip
