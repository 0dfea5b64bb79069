"""Tokens of pictures count as much as those of text, and no more; extremes are those of all tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule, symbolic_trace

from qexport.api.vision_language.sources import balanced
from qexport.calibrate.block_activations import Stream, collect
from qexport.calibrate.pictures import drawn_picture
from qexport.capture.blocks import Block
from qexport.quant.observers import AbsmaxObserver, ChannelAbsmax, ChannelMeanAbs, CompositeObserver

ROWS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3)


@given(ROWS)
def test_as_many_tokens_of_pictures_count_as_of_text(rows):
    text = torch.tensor(rows)
    counted = balanced(text)
    assert (counted & text).equal(text)
    for row, words in zip(counted, text, strict=True):
        assert int((row & ~words).sum()) == min(int((~words).sum()), int(words.sum()))


def test_they_are_spread_evenly():
    text = torch.tensor([[False] * 12 + [True] * 3])
    assert balanced(text)[0].nonzero().flatten().tolist() == [0, 4, 8, 12, 13, 14]


def test_sums_are_of_counted_tokens_and_extremes_of_all():
    x = torch.tensor([[[1.0, 2.0], [9.0, 1.0], [3.0, -4.0]]])
    counted = torch.tensor([[True, False, True]])
    module: GraphModule = symbolic_trace(_Twice())
    block = Block("block", module, ["x"], ["y"], [])
    stream = Stream([{"x": x}], [None], {"x": 0}, counted=[counted])
    node = next(node for node in module.graph.nodes if node.op == "placeholder")
    makes = {
        "absmax": AbsmaxObserver, "channels": ChannelAbsmax, "mean": ChannelMeanAbs,
        "both": lambda: CompositeObserver(ChannelMeanAbs(), ChannelAbsmax()),
    }  # fmt: skip
    found = {name: collect(block, stream, module, {node: make})[node] for name, make in makes.items()}
    assert found["absmax"].absmax() == 9 and found["channels"].absmax().tolist() == [9, 4]
    assert found["mean"].mean().tolist() == pytest.approx([2, 3])
    mean, channels = found["both"].parts
    assert mean.mean().tolist() == pytest.approx([2, 3]) and channels.absmax().tolist() == [9, 4]


class _Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_drawn_pictures_are_the_same_for_the_same_seed():
    one, again, other = drawn_picture(3, 40, 60), drawn_picture(3, 40, 60), drawn_picture(4, 40, 60)
    assert one.shape == (40, 60, 3) and (one == again).all() and (one != other).any()
    assert one.std() > 20  # neither one colour nor black
