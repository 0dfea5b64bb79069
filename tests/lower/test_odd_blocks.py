"""Sizes and inputs that ONNX Runtime's kernels take otherwise than one would guess."""

import onnx
import pytest
import torch

from helpers import exports
from qexport.api.exporting import export
from qexport.artifact.manifest import MODEL_FILE
from qexport.capture.module import capture_module
from qexport.recipe.recipe import Recipe


@pytest.mark.parametrize("scheme", ["w4a16_g64_asym", "w2a16_g64_asym", "w4a16_g128_asym"])
def test_zero_points_of_an_odd_number_of_blocks(tmp_path, scheme):
    """576 inputs are 9 blocks of 64: a row of 4-bit zero points is 5 bytes, whose last half is padding."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(576, 40), torch.randn(3, 576)
    with torch.no_grad():
        linear.weight.add_(torch.randn(40, 9).repeat_interleave(64, 1) / 40)  # every block has a middle of its own
    recipe = Recipe(scheme=scheme, weights={"method": "rtn"}, accuracy_level=1)
    model = torch.nn.Sequential(linear, torch.nn.ReLU())
    exported = exports.export(capture_module(model, [x]), recipe, "cpu", tmp_path / "out")
    assert "MatMulNBits" in exported.products().values()
    expected, found = exported.in_pytorch()({"input": x}), exported.in_onnxruntime()({"input": x})
    torch.testing.assert_close(found["output"], expected["output"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # and both are near the float model, which zero points in a wrong place are not
        assert (found["output"] - model(x)).norm() / model(x).norm() < (0.2 if "w4" in scheme else 0.6)


def test_grouped_attention_is_given_no_positions(model_folder, tmp_path):
    """It would read the first of them for all rows; it counts from its lengths instead."""
    folder = export(model_folder("llama"), "w4a16_g32_rtn", out_dir=tmp_path / "out").folder
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2 and not any(name for node in nodes for name in node.input[9:10])
    assert "position_ids" not in {value.name for value in graph.input}
