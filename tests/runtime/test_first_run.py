"""No folder appears with a file that does not run."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qexport.api.exporting import export
from qexport.api.stages import lowering
from qexport.errors import RuntimeProblem
from qexport.recipe.recipe import Recipe
from qexport.runtime import first_run as first
from qexport.runtime.session import open_session
from qexport.targets import cuda


def with_more_scales(monkeypatch, operator: str, place: int) -> list[str]:
    """Let every export give the first node of this operator a row of scales too many; returns where it did."""
    lower_blocks, planted = lowering.lower_blocks, []

    def faulty(*arguments):
        lowered = lower_blocks(*arguments)
        nodes = [node for node in lowered.model.graph.all_nodes() if node.op_type == operator]
        node = next(node for node in nodes if (value := node.inputs[place].const_value) is not None and value.shape)
        scales = node.inputs[place]
        array = scales.const_value.numpy()
        more = np.concatenate([array, array[-1:]])
        scales.const_value = ir.tensor(more, name=scales.name)
        scales.shape = ir.Shape(more.shape)
        planted.append(node.name)
        return lowered

    monkeypatch.setattr(lowering, "lower_blocks", faulty)
    return planted


@pytest.mark.by_default("True-recipe1-*", "False-w4a16_g32_rtn-*")
@pytest.mark.parametrize(
    ("recipe", "operator", "place"),
    [
        ("w4a16_g32_rtn", "MatMulNBits", 2),
        (Recipe(scheme="w4a8_g128_int"), "DequantizeLinear", 1),
        (Recipe(scheme="w4a16_g32", embedding="w4a16_g32"), "GatherBlockQuantized", 2),
    ],
)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.each_value_once
def test_a_wrong_number_of_scales_is_found_before_the_folder_appears(
    model_folder, tmp_path, monkeypatch, recipe, operator, place, large
):
    planted = with_more_scales(monkeypatch, operator, place)
    if large:
        monkeypatch.setattr(first, "_LARGE", 0)
    with pytest.raises(RuntimeProblem, match="does not run in ONNX Runtime .*Nothing was written") as raised:
        export(model_folder("llama"), recipe, out_dir=tmp_path / "out", calibration="random")
    assert planted and not list(tmp_path.iterdir()) and "\n" not in str(raised.value)


def ran(folder) -> str:
    return json.loads((folder / "report.json").read_text())["export"]["first_run"]


def test_the_report_says_what_was_run(model_folder, tmp_path, monkeypatch):
    assert ran(export(model_folder("llama"), "w4a16_g32_rtn", out_dir=tmp_path / "a").folder) == (
        "ran once on CPUExecutionProvider"
    )
    monkeypatch.setattr(first, "_LARGE", 0)
    apart = export(model_folder("llama"), "w4a16_g32_int8_prompts", out_dir=tmp_path / "b", calibration="random")
    assert ran(apart.folder) == "ran once on CPUExecutionProvider, weights not packed"


def test_a_file_for_cuda_is_not_run_where_there_is_no_gpu(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "_has_driver", lambda: False)
    folder = export(model_folder("llama"), "w4a16_g32_rtn", out_dir=tmp_path / "out", target="cuda").folder
    assert ran(folder) == "not run: no NVIDIA driver on this machine"


@pytest.mark.by_default("True")
@pytest.mark.parametrize("large", [False, True])
def test_a_module_is_run_with_the_sizes_of_its_example(tmp_path, monkeypatch, large):
    class Picks(torch.nn.Module):
        """Reads floats, ids and a mask of truth values, and of its first input no other size than a multiple of 4."""

        def __init__(self):
            super().__init__()
            self.table, self.linear = torch.nn.Embedding(5, 32), torch.nn.Linear(32, 32)

        def forward(self, x, ids, keep_mask):
            x = x.reshape(x.shape[0], -1, 4).sum(-1)
            return torch.where(keep_mask, self.linear(x + self.table(ids)), 0.0)

    if large:
        monkeypatch.setattr(first, "_LARGE", 0)
    inputs = (torch.randn(3, 128), torch.zeros(3, dtype=torch.int64), torch.ones(3, 32, dtype=torch.bool))
    folder = export(Picks(), "w4a16_g32_rtn", out_dir=tmp_path / "out", example_inputs=inputs).folder
    assert ran(folder).startswith("ran once") and open_session(folder)
