"""Values by the place of a token in its padded row."""

import pytest
import torch
from torch.fx import symbolic_trace

from qexport.graph.edit import TensorSpec
from qexport.graph.meta import Meta
from qexport.lower.gqa import Unsuited, plan_grouping
from qexport.lower.row_places import can_be_turned, read_by_place

aten = torch.ops.aten


class Block:
    """A block of a graph whose values have the given shapes, by name."""

    def __init__(self, function, **shapes):
        self.module = symbolic_trace(function)
        for node in self.module.graph.nodes:
            node.meta[Meta.SPEC] = TensorSpec(torch.float32, shapes[node.name]) if node.name in shapes else None


def test_what_follows_from_sizes_alone_is_found_where_it_meets_tokens():
    def add_positions(x):
        places = aten.arange.default(aten.sym_size.int(x, 1))
        ones = aten.ones.default([1, 4])  # says nothing of a place
        return aten.add.Tensor(aten.mul.Tensor(x, aten.unsqueeze.default(places, 0)), ones)

    block = Block(add_positions, x=("b", "s"), arange_default=("s",), unsqueeze_default=(1, "s"), ones_default=(1, 4))
    (found,) = read_by_place(block, "s", ())
    assert [node.name for node in found] == ["unsqueeze_default", "mul_tensor"]
    assert can_be_turned([found], "b", "s")
    masks = [node for node in block.module.graph.nodes if node.name == "mul_tensor"]
    assert read_by_place(block, "s", masks) == []


@pytest.mark.parametrize(
    ("shape", "can"),
    [(("s", 8), True), ((1, "s", 8), True), (("b", "s", 8), True), ((1, 1, "s", 8), False), (("s",), False)],
)
def test_values_with_a_row_for_each_place_can_be_turned(shape, can):
    def add_positions(x):
        return aten.add.Tensor(x, aten.arange.default(aten.sym_size.int(x, 1)))

    block = Block(add_positions, x=("b", "s", 8), arange_default=shape)
    assert can_be_turned(read_by_place(block, "s", ()), "b", "s") is can


def test_places_that_every_layer_reads_keep_standard_attention(captured):
    model = captured("roformer_decoder")
    with pytest.raises(Unsuited, match="count the places of tokens in their row, padding included"):
        plan_grouping(model, model.load)
