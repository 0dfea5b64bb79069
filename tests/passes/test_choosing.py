"""Which linears are routers: those whose largest results are found to take the places of them, or to compare with."""

import pytest
import torch
from torch import nn

from qexport.capture.module import capture_module
from qexport.graph.sites import chooses, linears


def largest(x):
    return x.max(1)[0]


def top_values(x):
    return x.softmax(-1).topk(2).values


def returned(x):
    return x.topk(2)


def picked(x):
    best, index = x.softmax(-1).topk(2)
    return torch.zeros_like(x).scatter(-1, index, best)


def best_one(x):
    return torch.ones(16, 4)[x.argmax(-1)]


def above_the_second(x):
    return x.masked_fill(x < x.topk(2).values[..., -1:], 0.0)


def of_groups(x):
    groups = x.sigmoid().view(*x.shape[:-1], 4, 4).topk(2)[0].sum(-1).topk(1)[1]
    return torch.gather(x, -1, groups)


@pytest.mark.parametrize(
    ("use", "router"),
    [(largest, False), (top_values, False), (returned, False), (picked, True), (best_one, True),
     (above_the_second, True), (of_groups, True)],
)  # fmt: skip
def test_only_the_use_of_places_makes_a_router(use, router):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 16)

        def forward(self, x):
            return use(self.head(self.first(x)))

    (block,) = capture_module(Model(), (torch.randn(2, 3, 8),)).blocks
    assert [chooses(linear, last=True) for linear in linears(block.module.graph)] == [False, router]
    if use is returned:  # what a later block does with places is not seen here
        assert chooses(linears(block.module.graph)[1], last=False)
