"""Where a module is cut into blocks: at its layers, in a list of its own or as a Sequential itself."""

import pytest
import torch
from torch import nn

from qexport.capture.module import capture_module


class Residual(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.net(x)


ENDS = nn.Linear(16, 32), nn.Linear(32, 8)


@pytest.mark.parametrize(
    ("middle", "names"),
    [
        ([Residual(), Residual()], ["0", "1", "2", "3"]),
        ([nn.Sequential(Residual(), Residual())], ["prologue", "1.0", "1.1", "epilogue"]),
        ([nn.ReLU()], ["prologue"]),  # single operators
    ],
)
def test_a_sequential_is_cut_at_its_layers(middle, names):
    model = nn.Sequential(ENDS[0], *middle, ENDS[1])
    captured = capture_module(model, (torch.randn(3, 16),))
    assert [block.name for block in captured.blocks] == names
    assert sorted(n for b in captured.blocks for n in b.parameters) == sorted(n for n, _ in model.named_parameters())
