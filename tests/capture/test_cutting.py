"""Where a module is cut into blocks: at its layers, in a list of its own or as a Sequential itself."""

import pytest
import torch
from torch import nn

from helpers.runners import captured_runner, load_weights
from qexport.capture.module import capture_module
from qexport.graph.sites import linears


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


class Looped(nn.Module):
    """Two rows of layers that take turns."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({n: nn.ModuleList(Residual() for _ in range(2)) for n in ("low", "high")})
        self.first, self.last = ENDS

    def forward(self, x):
        low = high = self.first(x)
        for _ in range(2):
            for layer in self.inner["low"]:
                low = layer(low + high)
            for layer in self.inner["high"]:
                high = layer(low + high)
        return self.last(high)


def test_layers_in_a_loop_are_one_block_whose_weights_are_there_once():
    model, x = Looped(), torch.randn(3, 16)
    captured = capture_module(model, (x,))
    assert [block.name for block in captured.blocks] == ["prologue", "inner", "epilogue"]
    assert sorted(n for b in captured.blocks for n in b.parameters) == sorted(n for n, _ in model.named_parameters())
    assert len(linears(captured.blocks[1].module.graph)) == 2 * 8
    got = captured_runner(load_weights(captured))({captured.inputs[0].name: x})
    with torch.no_grad():
        assert torch.allclose(got[captured.outputs[0].name], model(x), atol=1e-6)
