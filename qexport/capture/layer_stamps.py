"""Blocks of layers that were not traced, made from the block of a traced layer that does the same."""

from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, Node

from ..errors import CaptureError
from ..graph.edit import get_tensor, module_of
from ..graph.meta import Meta
from ..graph.sites import note_uses
from ..graph.views import results_of, tensor_name
from .blocks import Block
from .layer_groups import LayerGroups


def stamp(
    blocks: Sequence[Block],
    layers: LayerGroups,
    pasts: Sequence[Sequence[str]],
    presents: Sequence[Sequence[str]],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[list[Block], list[list[str]], list[list[str]]]:
    """The blocks of all layers of a model that was traced with its first `layers.needed` layers.

    Args:
        blocks: as `cut` made them.
        pasts, presents: names of the values that hold the cache of each traced layer, before and after.
        tensors: all weights and constants of the model.

    Returns:
        the blocks, and pasts and presents of every layer.

    Raises:
        CaptureError: a layer reads or hands on something else than its cache, what all layers share, and one value
            from the layer before.
    """
    at = {block.name: i for i, block in enumerate(blocks)}
    names = [f"{layers.container}.{i}" for i in range(len(layers.first))]
    if [n for n in names if n in at] != names[: layers.needed] or at[names[0]] + layers.needed != len(blocks) - 1:
        raise CaptureError("the traced layers are not the blocks between prologue and epilogue", place=names[0])
    start = at[names[0]]
    traced, last = list(blocks[start:-1]), blocks[-1]
    before, after = [list(p) for p in pasts], [list(p) for p in presents]
    # What a layer hands to the next one: the rest is its cache, or made of weights alone and shared.
    streams = [_stream(block, present) for block, present in zip(traced, after, strict=True)]
    private = {value for values in (streams, *after) for value in values}
    for i, block in enumerate([*traced, last]):
        if private.intersection(block.inputs) - set(streams[i - 1 : i]) or (i and streams[i - 1] not in block.inputs):
            raise CaptureError("reads more of the layers before it than the last one's result", place=block.name)
    stamped = []
    for number in range(layers.needed, len(names)):
        model = layers.first[number]
        block = traced[model]
        rename = {name: f"{name}_{number}" for name in (*before[model], *block.outputs)}
        rename[streams[model - 1]] = streams[number - 1]
        stamped.append(_copy(block, names[number], rename, tensors))
        streams.append(rename[streams[model]])
        before.append([rename[n] for n in before[model]])
        after.append([rename[n] for n in after[model]])
    end = {streams[layers.needed - 1]: streams[-1]}
    epilogue = Block(last.name, last.module, [end.get(n, n) for n in last.inputs], last.outputs, last.parameters)
    found = [*blocks[:start], *traced, *stamped, epilogue]
    made = [value for block in found for value in block.outputs]
    if len(set(made)) != len(made):
        raise CaptureError("two values would have one name", place=layers.container)
    note_uses([block.module.graph for block in found])
    return found, before, after


def _stream(block: Block, present: Sequence[str]) -> str:
    """The one output that depends on inputs and is not the cache."""
    live: set[Node] = set()
    for node in block.module.graph.nodes:
        if node.op == "placeholder" or any(n in live for n in node.all_input_nodes):
            live.add(node)
    results = zip(block.outputs, results_of(block.module.graph), strict=True)
    found = [name for name, node in results if node in live and name not in present]
    if len(found) != 1:
        raise CaptureError(f"hands on {len(found)} values", place=block.name)
    return found[0]


def _copy(block: Block, name: str, rename: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Block:
    """A block with the weights of the layer `name`; `rename` is for the inputs and outputs that are the layer's own."""
    graph = Graph()
    env: dict[Node, Node] = {}
    used: dict[str, torch.Tensor] = {}
    inputs, outputs = ([rename.get(n, n) for n in values] for values in (block.inputs, block.outputs))

    def moved(path: str) -> str:
        return f"{name}{path.removeprefix(block.name)}" if f"{path}.".startswith(f"{block.name}.") else path

    placeholders = iter(inputs)
    for node in block.module.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(next(placeholders))
        elif node.op == "get_attr":
            own = tensor_name(node)
            target = moved(own)
            if target not in tensors:  # a constant of the traced layer's code, which is the same in this one
                target = own
            env[node] = graph.get_attr(target)
            used[target] = get_tensor(block.module, target) if target == own else tensors[target]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {**node.meta, Meta.MODULE_PATH: moved(node.meta.get(Meta.MODULE_PATH, ""))}
    module = module_of(graph, used, type(block.module).__name__)
    return Block(name, module, inputs, outputs, list(used))
