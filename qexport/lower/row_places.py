"""Values by the place of a token in its padded row, which some models count without looking at what is padding.

Learned positions of decoders like BART's are rows of a table from the number of tokens before on. Where real tokens are
put first, the values of their places go with them: what a token gets is what it gets in the caller's order.
"""

from collections.abc import Collection

import torch
from torch.fx import Node

from ..capture.blocks import Block
from ..graph.edit import TensorSpec, call, is_call, shape_of
from ..graph.meta import Meta

aten = torch.ops.aten
ops = torch.ops.qexport
_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.slice.Tensor)  # of a table, the last
Read = tuple[Node, Node]  # a value by place, and who reads it beside what tokens say


def read_by_place(block: Block, tokens: int | str, masks: Collection[Node]) -> list[Read]:
    """Where values of a block that follow from sizes alone, one for each new token, meet what depends on tokens.

    Args:
        tokens: the size of the axis of new tokens.
        masks: what attention adds to scores is made of, which is left out.
    """
    said, by_place, found = set[Node](), set[Node](), list[Read]()
    for node in block.module.graph.nodes:
        if node.op == "placeholder":
            said.add(node)
        elif node.op == "call_function" and not is_call(node, aten.sym_size.int):
            inputs = node.all_input_nodes
            if said.intersection(inputs):
                said.add(node)
                found += [(n, node) for n in inputs if n in by_place and node not in masks]
            elif (is_call(node, *_COUNTS) or by_place.intersection(inputs)) and _has(node, tokens):
                by_place.add(node)
        elif node.op == "output":
            found += [(n, node) for n in node.all_input_nodes if n in by_place and n not in masks]
    return found


def can_be_turned(found: Collection[Read], batch: int | str, tokens: int | str) -> bool:
    """Whether values by place are such as `turn_places` knows."""
    return all(reader.op == "call_function" and _rows(shape_of(value), batch, tokens) for value, reader in found)


def turn_places(found: Collection[Read], ids: Node, order: Node) -> None:
    """Let readers have values by place in another order.

    Args:
        found: of the first block, all of which `can_be_turned`.
        ids: [batch, sequence], in the caller's order; order: of the tokens.
    """
    graph = ids.graph
    batch, tokens = shape_of(ids)
    turned: dict[Node, Node] = {}
    for value, reader in found:
        if value not in turned:
            with graph.inserting_after(max(value, order)):
                size = call(graph, aten.sym_size.int, (ids, 0), like=ids, dtype=torch.int64, shape=())
            rows, shape = value, shape_of(value)
            if shape[1] != tokens:
                with graph.inserting_after(size):
                    rows = call(graph, aten.unsqueeze.default, (value, 0), like=value, shape=(1, *shape))
            with graph.inserting_after(max(rows, size)):
                sizes = [size, *[-1] * (len(shape_of(rows)) - 1)]
                each = call(graph, aten.expand.default, (rows, sizes), like=value, shape=(batch, *shape_of(rows)[1:]))
            with graph.inserting_after(each):
                turned[value] = call(graph, ops.take_tokens.default, (each, order), like=each)
        reader.replace_input_with(value, turned[value])


def _has(node: Node, tokens: int | str) -> bool:
    return isinstance(node.meta.get(Meta.SPEC), TensorSpec) and tokens in shape_of(node)


def _rows(shape: tuple[int | str, ...], batch: int | str, tokens: int | str) -> bool:
    """[tokens, features], [1 or batch, tokens] or [1 or batch, tokens, features]."""
    return shape[:2] in ((1, tokens), (batch, tokens)) and len(shape) <= 3 or shape[:1] == (tokens,) and len(shape) == 2
