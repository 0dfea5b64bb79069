"""Text that the float model writes: the same whatever is in memory, and random tokens for nobody who did not ask."""

from unittest.mock import patch

import pytest
import torch

import qexport
from helpers.random_modules import save_encoder, save_seq2seq
from qexport.calibrate import float_model, own_text
from qexport.calibrate.own_text import _together
from qexport.errors import InputError
from qexport.progress import no_stage_progress
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe

SPEC = CalibrationSpec(source="self", samples=3, sequence_length=12, batch_size=2)
STATIC = Recipe(scheme="w8a8_static", calibration=SPEC)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_model_beyond_the_memory_writes_the_same_text_a_block_at_a_time(family, captured, monkeypatch):
    model = captured(family)
    whole = own_text.own_text(model, SPEC, no_stage_progress, "writes")
    monkeypatch.setattr(float_model, "_free", lambda device: 1000)
    real, most, seen = model.load, [], []

    def load(name):
        most.append(sum(any(t.device.type == "cpu" for t in b.module.buffers()) for b in model.blocks))
        return real(name)

    monkeypatch.setattr(model, "load", load)
    blockwise = own_text.own_text(model, SPEC, lambda *said: seen.append(said), "writes")
    assert max(most) == 1
    assert torch.equal(whole.input_ids, blockwise.input_ids) and whole.described == blockwise.described
    assert seen == [*(("writes", done, 12) for done in range(11)), ("writes", 12, 12)]


def test_how_many_texts_are_written_together_is_no_matter_of_the_memory(captured, monkeypatch):
    model, many = captured("llama"), SPEC.model_copy(update={"samples": 500})
    monkeypatch.setattr(float_model, "_free", lambda device: 1000)
    assert _together(model, many) == 16
    monkeypatch.setattr(own_text, "_LARGE", 1000)
    assert _together(model, many) == 500
    features = 2 * 2 * 2 * 16  # keys and values of both layers, two heads of 16
    monkeypatch.setattr(own_text, "_CACHES", 4 * features * SPEC.sequence_length * 40)
    assert _together(model, many) == 40
    monkeypatch.setattr(own_text, "_CACHES", 1)
    assert _together(model, many) == 16


@pytest.mark.slow
def test_validation_without_a_text_needs_no_more_than_a_block(model_folder, export_folder, tmp_path, monkeypatch):
    exported = export_folder("llama", "w8a8_dyn")
    found = []
    for free in (1 << 40, 1000):
        monkeypatch.setattr(float_model, "_free", lambda device, free=free: free)
        found.append(qexport.validate(exported, model_folder("llama"), windows=1, window=24, greedy=0))
    assert found[0].own_text and found[0].text == found[1].text
    assert found[0].logits.float_perplexity == found[1].logits.float_perplexity


REFUSED = {
    "bert": r"an encoder cannot write its own calibration text.*--calibration FILE.*random",
    "t5": r"an encoder-decoder cannot write its own calibration text.*--calibration FILE",
    "whisper": r"the model cannot make its own source to calibrate on.*feature extractor",
}


def saved(family, folder):
    return (save_encoder if family == "bert" else save_seq2seq)(family, folder / family)


@pytest.mark.parametrize("family", REFUSED)
def test_what_writes_no_text_is_refused_before_it_is_captured(family, tmp_path):
    """Random tokens are for nobody who did not ask."""
    folder = saved(family, tmp_path)
    with patch("torch.export.export", side_effect=AssertionError("captured")):
        with pytest.raises(InputError, match=REFUSED[family]):
            qexport.export(folder, STATIC, out_dir=tmp_path / "out")
        if family == "bert":
            with pytest.raises(InputError, match=REFUSED[family]):
                qexport.inspect(folder, STATIC, calibrate=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_where_overrides_may_keep_every_layer_in_float_the_layers_decide(family, tmp_path):
    folder = saved(family, tmp_path)
    one = STATIC.model_copy(update={"overrides": (Override(match="*.0.*", scheme="float"),)})
    with pytest.raises(InputError, match=REFUSED[family]):
        qexport.export(folder, one, out_dir=tmp_path / "out")
    everything = STATIC.model_copy(update={"overrides": (Override(match="*", scheme="float"),)})
    qexport.export(folder, everything, out_dir=tmp_path / "out")
