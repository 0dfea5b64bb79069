"""Rows of attention that see nothing, however the mask says so: the file computes what PyTorch computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from qexport.api.exporting import export
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.session import open_session

FLOAT = Recipe(scheme="w4a16_g32", overrides=[Override(match="*", scheme="float")])


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x, mask):
        heads = self.linear(x).unflatten(-1, (2, 16)).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e9, float("-inf"), False])
@pytest.mark.parametrize("seen", [0, 2])
def test_a_row_is_the_mean_or_nothing_as_in_pytorch(tmp_path, hidden, seen):
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(2, 5, 32)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool) if hidden is False else torch.zeros(2, 1, 5, 5)
    mask[0, 0, 0, seen:] = hidden
    with torch.no_grad():
        expected = model(x, mask)
    assert bool(expected[0, 0].abs().max() == 0) is (not seen and hidden in (False, float("-inf")))
    folder = export(model, FLOAT, out_dir=tmp_path / "out", example_inputs={"x": x, "mask": mask}).folder
    found = open_session(folder, threads=1).run(None, {"x": x.numpy(), "mask": mask.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)
