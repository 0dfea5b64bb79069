"""Modules whose outermost forward adds up what its layers make, and splits along a dimension that may change."""

import torch
from torch import nn

from helpers import exports
from qexport.api.stages.capturing import capture_model
from qexport.recipe.recipe import Recipe


class Pairs(nn.Module):
    """Layers of two parts, which the forward around them adds to the stream one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)]) for _ in range(2))

    def forward(self, x):
        for first, second in self.layers:
            x = first(x).relu() + x
            x = second(x).relu() + x
        return x.mean(0, keepdim=True) + x


class Parts(nn.Module):
    """Rows in pieces of three at most."""

    def __init__(self, size):
        super().__init__()
        self.size, self.linear = size, nn.Linear(32, 32)

    def forward(self, x):
        return torch.cat([self.linear(part) * 2 for part in x.split(self.size)])


def same(tmp_path, model, *batches):
    captured = capture_model(model, (batches[0],), {"x": {0: "batch"}})
    made = exports.export(captured, Recipe(scheme="w8a8_dyn"), "cpu", tmp_path / "out", calibration=[(batches[0],)])
    graph, file = made.in_pytorch(), made.in_onnxruntime()
    for x in batches:
        want, got = graph({"x": x})["output"], file({"x": x})["output"]
        assert torch.allclose(want, got, atol=1e-5)
        assert torch.allclose(model(x), got, atol=0.1)
    return captured


def test_what_stands_between_the_parts_of_the_last_layer_is_in_it(tmp_path):
    captured = same(tmp_path, Pairs().eval(), torch.randn(5, 32), torch.randn(3, 32))
    assert [block.name for block in captured.blocks] == ["layers.0", "layers.1", "epilogue"]


def test_one_part_of_a_dynamic_size_is_all_of_it(tmp_path):
    same(tmp_path, Parts(100).eval(), torch.randn(5, 32), torch.randn(8, 32))
