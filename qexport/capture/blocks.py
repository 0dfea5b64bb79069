"""Cutting a graph into blocks that can be loaded, run and quantized one after another.

A block is a GraphModule of its own: its placeholders are the values it needs from earlier blocks or from outside, its
outputs the values that later blocks or the caller need. Layers are found by module path (children `0, 1, 2, ...` of one
container that hold most of the weights); nodes that belong to no layer go where their inputs put them. Layers that run
in a loop, each several times, are one block together.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from posixpath import commonpath
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..errors import CaptureError
from ..graph.edit import copy_of, get_tensor, is_call, module_of, spec_of, tensors_of
from ..graph.meta import Meta
from ..graph.sites import note_uses
from ..graph.views import operand, tensor_name
from .lines import line_of

_LAYER = re.compile(r"^(?P<container>.*?)\.(?P<index>\d+)(?=\.|$)")
_OF_ITSELF = re.compile(r"^(?P<index>\d+)(?=\.|$)")  # the same where the model is the container


Home = Callable[[Node], str | None]


@dataclass
class Block:
    """One piece of a model.

    Attributes:
        name: "prologue", the module path of the layer, or "epilogue".
        module: the graph; its weights are fake or meta tensors until they are loaded.
        inputs: names of the values it reads, one for each placeholder.
        outputs: names of the values it makes, in the order of its output.
        parameters: names of its weights in the checkpoint.
    """

    name: str
    module: GraphModule
    inputs: list[str]
    outputs: list[str]
    parameters: list[str] = field(default_factory=list)

    def copy(self) -> "Block":
        """The same block once more, its weights not loaded."""
        held = tensors_of(self.module)
        twins = {name: tensor.to("meta") if name in self.parameters else tensor for name, tensor in held.items()}
        return Block(
            self.name, copy_of(self.module, twins), list(self.inputs), list(self.outputs), list(self.parameters)
        )


def handed_on(outputs: Sequence[str], following: Sequence[str]) -> str:
    """The value that a block hands on, by name: the residual stream, which the next one reads before anything else.

    Args:
        outputs: of the block; following: inputs of the next one, none behind the last.
    """
    return next((name for name in following if name in outputs), outputs[0])


def cut(module: GraphModule, results: list[str]) -> list[Block]:
    """Cut a normalized graph into blocks in the order in which they run.

    Args:
        module: the whole graph, weights as get_attr nodes.
        results: names of the nodes whose values are the model's outputs.

    Raises:
        CaptureError: a layer needs a value that a later layer makes.
    """
    graph = module.graph
    layers, home = _row(graph)
    try:
        part = _assign(graph, layers, home)
    except CaptureError:
        if (loop := _loop(graph)) is None:
            raise
        layers, home = loop
        part = _assign(graph, layers, home)
    names = ["prologue", *layers, "epilogue"]
    blocks = []
    for index, name in enumerate(names):
        nodes = [n for n in graph.nodes if n.op == "call_function" and part[n] == index]
        if nodes:
            blocks.append(_block(module, name, nodes, part, index, results))
    note_uses([block.module.graph for block in blocks])
    return blocks


def _row(graph: Graph) -> tuple[list[str], Home]:
    """The layers that run one after another, and to which of them a node belongs."""
    layers = _layers(graph)
    pattern = _OF_ITSELF if layers and layers[0].isdigit() else _LAYER
    return layers, lambda node: _layer_of(node, pattern)


def _loop(graph: Graph) -> tuple[list[str], Home] | None:
    """The one block of all layers, by the module that holds them, where some run again behind others; else None."""
    calls = [layer for node in graph.nodes if (layer := _layer_of(node, _LAYER))]
    turns = Counter(layer for layer, _ in groupby(calls))
    if max(turns.values(), default=0) < 2:
        return None
    name = commonpath(layer.replace(".", "/") for layer in turns).replace("/", ".") or "layers"
    return [name], lambda node: name if _layer_of(node, _LAYER) in turns else None


def _layers(graph: Graph) -> list[str]:
    """Module paths of the repeated layers, in order; empty when there is no such container.

    The container that holds most of the weights; a model that is one itself, of items that are no single operators,
    where that leaves smaller blocks.
    """
    sizes = {tensor_name(n): n.meta["val"].numel() for n in graph.nodes if n.op == "get_attr"}
    held: dict[str, Counter[int]] = {}
    for name, size in sizes.items():
        if found := _place(name, _LAYER):
            held.setdefault(found[0], Counter())[found[1]] += size
    chosen = max(held, key=lambda container: held[container].total(), default=None)
    own: Counter[int] = Counter()
    composed: set[int] = set()
    for name, size in sizes.items():
        if found := _place(name, _OF_ITSELF):
            own[found[1]] += size
            composed |= {found[1]} if name.count(".") > 1 else set()

    def largest(items: Counter[int]) -> int:
        """Weights of the largest block; those around the items are at most two."""
        return max(sum(sizes.values()) - items.total(), *items.values())

    if len(composed) > 1 and (chosen is None or largest(own) < largest(held[chosen])):
        return [str(index) for index in sorted(own)]
    return [] if chosen is None else [f"{chosen}.{index}" for index in sorted(held[chosen])]


def _place(path: str, pattern: re.Pattern[str]) -> tuple[str, int] | None:
    """The container and the number of the layer that a module path lies in."""
    match = pattern.match(path)
    return match and (match.groupdict().get("container", ""), int(match["index"]))


def _layer_of(node: Node, pattern: re.Pattern[str]) -> str | None:
    """The module path of the layer that makes a call; None where it is made outside of all."""
    found = _place(node.meta.get(Meta.MODULE_PATH, ""), pattern) if node.op == "call_function" else None
    return found and f"{found[0]}.{found[1]}".removeprefix(".")


def _assign(graph: Graph, layers: list[str], home: Home) -> dict[Node, int]:
    """Part of every call: 0 is the prologue, 1 + i layer i, len(layers) + 1 the epilogue.

    Args:
        home: the name of the layer that makes a call; None where it is made outside of all.
    """
    index = {name: i + 1 for i, name in enumerate(layers)}
    last = len(layers) + 1
    part: dict[Node, int] = {}
    # The last call that the last layer makes; the module around may add up what it makes in between.
    calls = (node for node in reversed(graph.nodes) if layers and home(node) == layers[-1])
    end = next(calls, None)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        earliest = max((part[n] for n in node.all_input_nodes if n in part), default=0)
        own = index.get(home(node) or "")
        if own is None:
            # Belongs to no layer: as early as its inputs allow, but what follows the last layer is the epilogue.
            own = last if end is not None and end < node and earliest == len(layers) else earliest
        if _clips_alone(node):
            own = earliest  # where the range is taken that it ends
        if own < earliest:
            raise CaptureError(
                f"layer {layers[own - 1]} needs a value made later, in part {earliest}", place=node.name,
                remedy="The layers of this model do not run one after another; it cannot be cut into blocks",
            )  # fmt: skip
        part[node] = own
    if not layers:
        return dict.fromkeys(part, 0)
    for node in part:  # a size that layers share is no layer's, in whichever it was worked out first
        if _is_size(node) and any(part.get(user, part[node]) != part[node] for user in node.users):
            part[node] = max((part[n] for n in node.all_input_nodes if n in part), default=0)
    fixed: set[Node] = set()  # made of weights and constants alone: beside the first who reads it
    for node in graph.nodes:
        if node.op == "get_attr" or (node in part and all(n in fixed for n in node.all_input_nodes)):
            fixed.add(node)
    for node in reversed(graph.nodes):
        if node in fixed and node in part:
            part[node] = min((part[user] for user in node.users if user in part), default=part[node])
    return part


def _is_size(node: Node) -> bool:
    """Whether a node is arithmetic of sizes."""
    return isinstance(node.meta.get("val"), torch.SymInt) and not is_call(node, torch.ops.aten.sym_size.int)


def _clips_alone(node: Node) -> bool:
    """Whether a node clips a value that nothing else reads."""
    return is_call(node, torch.ops.aten.relu.default, torch.ops.aten.clamp.default) and len(operand(node).users) == 1


def _block(
    whole: GraphModule, name: str, nodes: list[Node], part: dict[Node, int], index: int, results: list[str]
) -> Block:
    graph, inputs = Graph(), []
    env: dict[Node, Node] = {}
    tensors: dict[str, torch.Tensor] = {}
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    outside = sorted(read, key=_is_flag)  # `handed_on` takes the first
    for node in outside:
        if node.op == "get_attr":
            continue
        env[node] = graph.placeholder(node.name)
        env[node].meta = _meta(node)
        inputs.append(node.name)
    for node in outside:
        if node.op == "get_attr":
            weight = tensor_name(node)
            env[node] = graph.get_attr(weight)
            env[node].meta = _meta(node)
            tensors[weight] = get_tensor(whole, weight)
    for node in nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = _meta(node)
    outputs = [n for n in nodes if n.name in results or any(part.get(u, index) != index for u in n.users)]
    graph.output(tuple(env[n] for n in outputs))
    module = module_of(graph, tensors, f"Block_{index}")
    return Block(name, module, inputs, [n.name for n in outputs], list(tensors))


def _is_flag(node: Node) -> bool:
    """Whether a value is of integers or of bools: a mask, ids, a size."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or not value.is_floating_point()


def _meta(node: Node) -> dict[str, Any]:
    """What passes and the lowering know of a node; fake tensors and module stacks stay behind."""
    spec, path = spec_of(node.meta.get("val")), node.meta.get(Meta.MODULE_PATH, "")
    kept: dict[str, Any] = {Meta.SPEC: spec, Meta.MODULE_PATH: path}
    kept |= {key: node.meta[key] for key in (Meta.NAMED, Meta.GATES) if key in node.meta}
    return kept | {Meta.LINE: line} if (line := line_of(node)) else kept
