import json

import onnx
import pytest

from helpers.random_decoders import save_model
from qexport import export, inspect, validate
from qexport.errors import PassError
from qexport.recipe.recipe import Recipe

TEXT = " ".join(f"word {i} of a text" for i in range(60))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("rotated") / "llama", tie_word_embeddings=True)


def rotated(scheme, **more):
    calibration = {"source": "random", "samples": 4, "sequence_length": 16}
    return Recipe(scheme=scheme, rotation={}, calibration=calibration, **more)


def every_node(graph):
    """Nodes of a graph and of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g)


@pytest.mark.by_default("w4a16_g32")
@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w4a16_g32"])
def test_an_export_in_another_basis_is_proved_like_any_other(llama, scheme, tmp_path):
    result = export(llama, rotated(scheme, weights={"method": "rtn"}), out_dir=tmp_path / "out")
    assert result.reference.difference < 1e-4 and result.reference.weights > 10
    report = validate(tmp_path / "out", llama, windows=2, window=24, greedy=0)
    assert report.problems == () and report.reader.difference < 1e-4
    assert min(row.sqnr_db for row in report.layers.blocks if row.sqnr_db is not None) > 10
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["export"]
    assert "RotateResidual" in kept["model_passes"]


@pytest.mark.slow
def test_all_rotations_with_a_cache_in_four_bits(llama, tmp_path):
    everything = {"values": True, "keys": True, "inputs": True}
    recipe = rotated("w8a8_dyn", weights={"method": "rtn"}, kv_cache={"bits": 4}).model_copy(
        update={"rotation": Recipe(scheme="w8a8_dyn", rotation=everything).rotation}
    )
    export(llama, recipe, out_dir=tmp_path / "out")
    report = validate(tmp_path / "out", llama, windows=2, window=24, greedy=0)
    assert report.problems == () and report.logits.kl_mean < 0.1
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["export"]
    assert list(kept["model_passes"]) == ["RotateResidual", "RotateValues", "RotateKeys", "RotateInputs"]
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    attentions = [node for node in every_node(model.graph) if node.op_type == "GroupQueryAttention"]
    assert attentions and not any(a.i for node in attentions for a in node.attribute if a.name == "do_rotary")


def test_gptq_and_resumed_blocks_see_the_turned_weights(llama, tmp_path):
    recipe = rotated("w8a16_g32", weights={"method": "gptq"})
    export(llama, recipe, out_dir=tmp_path / "out")
    assert validate(tmp_path / "out", llama, windows=1, window=24, greedy=0).logits.kl_mean < 0.05


def test_a_model_that_cannot_be_turned_is_refused_by_the_dry_run_too(tmp_path):
    folder = save_model("gemma2", tmp_path / "gemma2")
    recipe = rotated("w8a8_dyn")
    for verb in (inspect, lambda *given: export(*given, out_dir=tmp_path / "out")):
        with pytest.raises(PassError, match="rotation: .*layernorm.*Remove rotation"):
            verb(folder, recipe)
