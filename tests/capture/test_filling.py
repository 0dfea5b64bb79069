"""Tensors filled part by part become concatenations where the parts make the whole, and stay where they do not."""

import pytest
import torch
from torch import nn

from qexport.capture.copies_to_concat import join_parts

aten = torch.ops.aten


class Fills(nn.Module):
    def __init__(self, fill):
        super().__init__()
        self.fill = fill

    def forward(self, x):
        return self.fill(x)


def in_order(x):
    y = x.new_empty(*x.shape[:-1], 6)
    y[..., :4].copy_(x * 2)
    y[..., 4:].copy_(x[..., :2])
    return y + 1, y.transpose(0, 1)


def turned(x):
    y = torch.zeros(3, x.shape[0], 4)
    y[1:] = x[None, :, :4].expand(2, -1, -1)
    y[:-2] = x[None]
    return y


def with_a_gap(x):
    y = x.new_zeros(x.shape[0], 6)
    y[:, :4] = x
    y[:, 5:] = x[:, :1]
    return y


def read_before(x):
    y = x.new_zeros(x.shape[0], 8)
    y[:, :4] = x
    early = y * 2
    y[:, 4:] = x
    return early + y


def along_two_axes(x):
    y = x.new_zeros(2, 4)
    y[:1] = x[:1]
    y[:, :2] = x[:2, :2]
    return y


def overlapping(x):
    y = x.new_zeros(x.shape[0], 4)
    y[:, :3] = x[:, :3]
    y[:, 2:] = x[:, 2:]
    return y


def graph_of(fill):
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    return torch.export.export(Fills(fill), (torch.ones(3, 4),), dynamic_shapes=shapes).module(check_guards=False)


def targets(module):
    return {node.target for node in module.graph.nodes}


@pytest.mark.parametrize("fill", [in_order, turned])
def test_parts_that_make_the_whole(fill):
    module = graph_of(fill)
    assert aten.copy_.default in targets(module)
    join_parts(module.graph)
    module.graph.lint()
    module.recompile()
    assert aten.copy_.default not in targets(module) and aten.cat.default in targets(module)
    x = torch.randn(5, 4)
    got, want = module(x), fill(x)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fill", [with_a_gap, read_before, along_two_axes, overlapping])
def test_parts_that_do_not(fill):
    module = graph_of(fill)
    before = str(module.graph)
    join_parts(module.graph)
    assert str(module.graph) == before
