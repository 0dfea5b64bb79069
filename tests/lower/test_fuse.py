"""Residual sums and norms become one node, and the values keep their names and numbers."""

from collections import Counter

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from qexport.api.exporting import export
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.session import optimized_graph

FLOAT = Recipe(scheme="w8a8_dyn", overrides=(Override(match="*", scheme="float"),))


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(16, 16), nn.Linear(16, 16), norm, nn.Linear(16, 16)

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return self.c(self.norm(y)) + y


@pytest.mark.parametrize(
    "norm, op", [(nn.LayerNorm(16), "SkipLayerNormalization"), (nn.RMSNorm(16), "SkipSimplifiedLayerNormalization")]
)
def test_a_sum_and_its_norm_are_one_node(tmp_path, norm, op):
    torch.manual_seed(0)
    model, x = Residual(norm), torch.randn(2, 5, 16)
    nn.init.normal_(norm.weight)
    folder = export(model, FLOAT, out_dir=tmp_path / "out", example_inputs=(x,)).folder
    ops = optimized_graph(folder).op_counts()
    assert ops[op] == 1 and not {"LayerNormalization", "RMSNormalization"} & set(ops)
    session = ort.InferenceSession(folder / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(got) - model(x)).abs().max() < 1e-5


def test_a_vector_that_is_added_stays_apart(tmp_path):
    class Shifted(Residual):
        def forward(self, x):
            return self.c(self.norm(self.a(x) + self.norm.weight))

    folder = export(
        Shifted(nn.LayerNorm(16)), FLOAT, out_dir=tmp_path / "o", example_inputs=(torch.randn(2, 5, 16),)
    ).folder
    ops = Counter(n.op_type for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)
    assert ops["LayerNormalization"] == 1 and not ops["SkipLayerNormalization"]
