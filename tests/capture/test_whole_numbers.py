"""int() of sizes in the code of a model stays a size."""

import sys

import torch
from torch import nn

from helpers.runners import captured_runner, load_weights
from qexport.capture.module import capture_module
from qexport.capture.whole_numbers import whole_numbers_of_sizes


class Strided(nn.Module):
    """Counts what a convolution makes as models of sound do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 5, stride=3)

    def forward(self, x, mask):
        length = int((x.shape[-1] - 5) / 3 + 1)
        assert isinstance(length, int | torch.SymInt)
        return self.conv(x[:, None]) * mask[:, None, ::3][..., :length]


def test_a_length_that_is_computed_in_floats_is_free():
    model, example = Strided().eval(), torch.randn(2, 11)
    axes = {name: {0: "batch", 1: "samples"} for name in ("x", "mask")}
    with whole_numbers_of_sizes(model):
        captured = capture_module(model, {"x": example, "mask": torch.ones_like(example)}, axes)
    targets = {str(node.target) for block in captured.blocks for node in block.module.graph.nodes}
    assert not {name for name in targets if "trunc" in name or "truediv" in name}
    run = captured_runner(load_weights(captured))
    for length in (5, 7, 23):
        feeds = {"x": torch.randn(3, length), "mask": (torch.rand(3, length) < 0.5).float()}
        with torch.no_grad():
            assert torch.allclose(run(feeds)["output"], model(**feeds), atol=1e-6)


def test_other_numbers_are_numbers():
    with whole_numbers_of_sizes(Strided()):
        whole = sys.modules[__name__].int
        assert whole("7") == 7 and whole(2.9) == 2 and whole("ff", 16) == 255 and isinstance(3, whole)
    assert "int" not in vars(sys.modules[__name__])
