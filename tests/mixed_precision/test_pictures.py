"""Schemes of a model of pictures and text: one budget for its three files."""

import json

import pytest

import qexport
from helpers.random_decoders import LISTS
from helpers.random_pictures import save_pictures_model
from qexport.errors import InputError
from qexport.recipe.recipe import CalibrationSpec, Recipe


@pytest.mark.slow
def test_one_budget_is_spent_on_pictures_and_text(tmp_path, monkeypatch):
    """Closer than one scheme everywhere in no more bytes, and what is found is what is validated."""
    # Wider than elsewhere: the graph of a small model is a large part of its files.
    llava = LISTS["vision_language"]["llava"]
    wide = {part: llava[part] | {"intermediate_size": 512} for part in ("text_config", "vision_config")}
    monkeypatch.setitem(LISTS["vision_language"], "llava", llava | wide)
    model = save_pictures_model("llava", tmp_path / "model", processor=False)
    spec = CalibrationSpec(source="random", samples=8, sequence_length=24)
    recipe = Recipe(scheme="w4a16_g16", lm_head="w4a16_g16", weights={"method": "rtn"}, calibration=spec)
    qexport.export(model, recipe, out_dir=tmp_path / "plain")
    size, judged = size_of(tmp_path / "plain"), {"windows": 4, "window": 24, "text": "random"}
    found = qexport.export_auto(model, recipe, out_dir=tmp_path / "auto", max_bytes=size, **judged)
    assert size_of(tmp_path / "auto") <= size and found.export.manifest.bytes["model"] == size_of(tmp_path / "auto")
    parts = {part: {s for n, s in found.schemes.items() if part in n} for part in ("vision_tower", "language_model")}
    assert all(parts.values()) and len(set.union(*parts.values())) > 1
    assert found.export.parts["vision"].folder == tmp_path / "auto" / "vision"
    reports = {name: qexport.validate(tmp_path / name, model, **judged) for name in ("plain", "auto")}
    # Few texts, and others than those that costs are of.
    assert 0.3 < found.predicted_kl / found.logits.kl_mean < 3
    assert found.logits.kl_mean < 0.8 * reports["plain"].logits.kl_mean
    assert found.logits.kl_mean == pytest.approx(reports["auto"].logits.kl_mean, rel=1e-6)
    assert json.loads((tmp_path / "auto" / "report.json").read_text())["auto"] == found.as_dict()
    with pytest.raises(InputError, match="bytes are too few"):
        qexport.export_auto(model, recipe, out_dir=tmp_path / "small", max_bytes=1000, **judged)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*/model.onnx*"))
