"""Prompts through int8 products, steps through the kernels of few-bit weights, in one file.

Many tokens at once keep the processor busy with arithmetic, and an int8 product has the cheaper one; a single token
waits for weights, and fewer bits come sooner. So the stack of blocks is there twice, as the branches of an If on the
number of new tokens (see branches.py). Both read and write the same cache.
"""

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import call, copy_of, finish, is_call, shape_of, tensors_of
from ..graph.meta import BESIDE
from ..graph.views import DequantizeLinear, Matmul
from ..passes.activations.quantize import round_per_token
from .qdq_patterns import form_of, linear_products

ops = torch.ops.qexport

# New tokens of a call up to which it counts as a step. The products cross at 6 to 8 tokens with one thread.
LONGEST_STEP = 8


def prompt_twin(module: GraphModule) -> GraphModule | None:
    """A copy of a canonical block in which weight-only products in groups have become int8 products.

    The weight is what its codes stand for, rounded again to int8 with one scale per output channel, and the input is
    rounded to 8 bits with one scale per token. Everything else is shared with the block.

    Returns:
        The copy, its tensors on the device they were on; None where the block has no such product.
    """
    if not any(_weight_only(product) for product in linear_products(module.graph)):
        return None
    twin = copy_of(module, tensors_of(module))
    graph = twin.graph
    readers: dict[Node, list[Node]] = {}
    for product in linear_products(graph):
        if _weight_only(product):
            canonical = Matmul.of(product)
            readers.setdefault(canonical.x, []).append(product)
            with graph.inserting_before(product):
                product.replace_input_with(canonical.weight, _in_int8(canonical.weight))
    for value, products in readers.items():
        round_per_token(graph, value, products)
    finish(twin)
    return twin


def _weight_only(product: Node) -> bool:
    """Whether a canonical product has a weight in groups and a float input, and is all of its linear."""
    weight = Matmul.of(product).weight
    if not is_call(weight, ops.dequantize_linear.default) or BESIDE & set(product.meta):
        return False
    form = form_of(product)
    return form.scales_in_sum and form.rounding is None


def _in_int8(weight: Node) -> Node:
    found, graph = DequantizeLinear.of(weight), weight.graph
    codes, columns = found.codes, shape_of(found.codes)[1:]
    arguments = (codes, found.scale, found.zero_point, found.block_size)
    step = call(graph, ops.channel_scale.default, arguments, like=weight, shape=columns)
    wide = call(
        graph, ops.expand_codes.default,
        (codes, found.scale, found.zero_point, None, step, found.block_size, found.bits), like=codes, dtype=torch.int8,
    )  # fmt: skip
    return call(graph, ops.dequantize_linear.default, (wide, step, None, 1, 0, 8), like=weight)
