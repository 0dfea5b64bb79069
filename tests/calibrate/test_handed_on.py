"""What the float model's blocks hand on is kept while it runs for the output projection, and read from the disk."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from helpers import exports
from qexport.api.stages import capturing
from qexport.artifact import scratch
from qexport.calibrate import handed_on
from qexport.calibrate.block_activations import Stream
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

CALIBRATION = CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2)
TIED = Recipe(
    scheme="w4a16_g16", lm_head="w4a16_g16", embedding="tied", weights=section("weights", method="gptq"),
    calibration=CALIBRATION,
)  # fmt: skip


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(scratch, "system", lambda: folder)
    monkeypatch.setattr(handed_on, "system", lambda: folder)
    return folder


def test_the_float_model_runs_once_and_nothing_else_changes(captured, model_folder, tmp_path, temporary, monkeypatch):
    passed: Counter = Counter()
    advance = Stream.advance

    def counted(stream, block, index):
        passed[block.name] += 1
        return advance(stream, block, index)

    monkeypatch.setattr(Stream, "advance", counted)
    monkeypatch.setattr(capturing, "capture_model", lambda *_, **__: captured("llama_bias"))
    found, runs = {}, {}
    for name, most in (("kept", handed_on._MOST), ("twice", 0)):
        monkeypatch.setattr(handed_on, "_MOST", most)
        passed.clear()
        exports.exporting.export(model_folder("llama_bias"), TIED, out_dir=tmp_path / name)
        blocks = json.loads((tmp_path / name / "report.json").read_text())["export"]["blocks"]
        data = (tmp_path / name / "model.onnx.data").read_bytes()
        found[name] = [block["sqnr_db"] for block in blocks], data
        runs[name] = set(passed.values())
    assert runs == {"kept": {2}, "twice": {3}}  # floats for the projection, codes, and floats to compare with
    assert found["kept"] == found["twice"] and any(found["kept"][0])
    assert not list(temporary.iterdir())


def test_what_has_no_room_is_not_kept(temporary):
    block = SimpleNamespace(name="only")
    captured = SimpleNamespace(blocks=[block, block], handed_on=lambda block: "state")
    stream = SimpleNamespace(batches=[{"state": torch.ones(2, 3)}])
    kept = handed_on.HandedOn()
    kept.note(captured, 1, stream)  # not from the first one on
    assert kept.stream(captured) is None
    kept.note(captured, 0, stream)
    again = kept.stream(captured)
    again.advance(block, 0)
    assert torch.equal(again.batches[0]["state"], torch.ones(2, 3))
    kept.forget()
    temporary.rmdir()  # empty, and now nobody can write there
    kept.note(captured, 0, stream)
    assert kept.stream(captured) is None
