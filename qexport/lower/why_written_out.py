"""Why an attention stayed as the model's code writes it: what it does with its cache or its scores."""

import torch
from torch.fx import Node

from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.edit import is_call, shape_of
from ..graph.schema import bind
from ..graph.sites import readers
from ..graph.views import Add, CachedAttention, Cat, operand
from .block_io import names_of, producers

aten, ops = torch.ops.aten, torch.ops.qexport
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_OWN_MASKS = (aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_FAR = 40  # nodes among which a softmax is looked for


def why_written_out(captured: CapturedModel) -> str:
    """The reason in the first layer that has one, as a sentence about the model."""
    pasts = {p.value for p in captured.inputs if p.name.startswith("past_key_values.")}
    causal = {name for name, (_, node) in producers(captured).items() if is_call(node, ops.causal_mask.default)}
    for block in captured.blocks:
        names = names_of(block)
        read = [node for node, name in names.items() if name in pasts and readers(node)]
        if read and not any(CachedAttention.match(user) for node in read for user in node.users):
            return _in_block(block, read, {node for node, name in names.items() if name in causal})
    return "its attention is written out"


def _in_block(block: Block, pasts: list[Node], causal: set[Node]) -> str:
    key, value = pasts[0], pasts[-1]
    if shape_of(key)[-1] != shape_of(value)[-1]:
        return "its cache holds what keys and values are made of, or heads of different size"
    if any((more := Cat.match(user)) is not None and more.dim in (2, -2) for user in _attentions(key)):
        return "attention reads more than the keys and values of tokens"
    if any(len(_attentions(node)) > 1 for node in (key, value)):
        return "several attentions read one cache"
    softmax = next((n for n in block.module.graph.nodes if is_call(n, aten.softmax.int, aten._softmax.default)), None)
    added = [] if softmax is None else _added(operand(softmax), causal)
    if "bias" in added:
        return "it adds a bias to the scores beside the mask"
    if "mask" in added:
        return "it has a mask of its own beside the causal one, or in its place"
    return "its attention is written out in a form that is not known"


def _attentions(past: Node) -> list[Node]:
    """What reads past and new keys or values together, beside what asks for sizes or returns them."""
    joined = [user for user in past.users if Cat.match(user) is not None]
    return [user for node in joined for user in readers(node) if user.op != "output"]


def _added(node: Node, causal: set[Node]) -> set[str]:
    """What stands between the product of queries and keys and the softmax, beside factors and the causal mask."""
    found: set[str] = set()
    at = node
    for _ in range(_FAR):
        if is_call(at, *_PRODUCTS):
            return found | ({"bias"} if is_call(at, aten.baddbmm.default) and bind(at).beta else set())
        if is_call(at, *_OWN_MASKS):
            found.add("mask")
        added, arguments = Add.match(at), [n for n in at.all_input_nodes if _leads_to_product(n)]
        if added is not None and added.other not in causal and added.x not in causal:
            found.add("bias")
        if not arguments:
            return found
        at = arguments[0]
    return found


def _leads_to_product(node: Node) -> bool:
    waiting, seen = [node], set[Node]()
    while waiting and len(seen) < _FAR:
        at = waiting.pop()
        if is_call(at, *_PRODUCTS):
            return True
        if at not in seen:
            seen.add(at)
            waiting += at.all_input_nodes
    return False
