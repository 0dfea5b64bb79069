"""The manifest names the float value that every linear reads."""

import onnx
import pytest

from helpers.breadth import quick
from qexport.api.exporting import export
from qexport.artifact import manifest as manifests
from qexport.artifact.branches import PROMPTS, STEPS, only

ROUNDING = {"QuantizeLinear", "DequantizeLinear", "Div", "Clip"}


@pytest.mark.by_default("w4a16_g32_rtn-*", "crossquant_w4a4-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "recipe",
    quick(
        ("w4a16_g32_rtn", "w8a8_static", "crossquant_w4a4", "llm_int8"),
        among=["w4a16_g32_rtn", "w8a8_static", "w8a8_dyn", "crossquant_w4a4", "w4a8_g128", "llm_int8", "fptq"],
    ),
)
def test_inputs_are_in_the_file_and_not_rounded(model_folder, tmp_path, recipe, target):
    for entry, makers in _inputs(model_folder("gpt_neox"), tmp_path / "out", recipe, target, PROMPTS):
        kind = makers[entry.input]
        # Of the other two, attention's output and the activation, some are scaled or cast.
        assert kind not in ROUNDING, entry.name
        assert kind.endswith("LayerNormalization") or entry.name.endswith((".dense", "4h_to_h")), entry.name


@pytest.mark.slow
def test_both_branches_call_inputs_alike(model_folder, tmp_path):
    for side in (PROMPTS, STEPS):
        for entry, makers in _inputs(
            model_folder("llama"), tmp_path / side.strip("/"), "w4a16_g32_int8_prompts", "cpu", side
        ):
            assert makers[entry.input] not in ROUNDING


def _inputs(model, out, recipe, target, side):
    """(entry, operators that make values, by name), for every linear."""
    export(model, recipe, out_dir=out, target=target, calibration="random")
    graph = only(onnx.load(out / "model.onnx", load_external_data=False), side).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    return [(entry, makers) for entry in manifests.load(out).linears]
