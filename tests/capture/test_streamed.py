"""Large encoders are captured without their weights, and compute the same as those that are loaded whole."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForSeq2SeqLM

import qexport
from helpers.breadth import quick
from helpers.random_modules import LISTS, save_encoder, save_seq2seq
from helpers.runners import captured_runner, load_weights, tokens
from qexport.api.stages.capturing import capture_model
from qexport.artifact.manifest import MODEL_FILE
from qexport.calibrate.encoder_inputs import encoder_batch
from qexport.capture import encoder, seq2seq, streamed
from qexport.capture.streamed import StreamedWeights
from qexport.errors import CaptureError
from qexport.models.source import open_model
from qexport.recipe.recipe import CalibrationSpec, Recipe

QUICK = ("bert",)


@pytest.fixture
def large(monkeypatch):
    """Every model is large."""
    monkeypatch.setattr(streamed, "LARGE", 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(QUICK, among=LISTS["encoders"]))
def test_a_large_encoder_computes_what_a_small_one_does(family, tmp_path, large, monkeypatch):
    folder = save_encoder(family, tmp_path / "model")
    found = capture_model(folder)
    assert isinstance(found.weights, StreamedWeights)
    monkeypatch.setattr(encoder, "open_streamed", lambda *_: None)
    wanted = capture_model(folder)
    assert [b.name for b in found.blocks] == [b.name for b in wanted.blocks]
    ids = tokens(2, 9)
    feeds = encoder_batch(found, ids, torch.ones_like(ids))
    got, want = (captured_runner(load_weights(model))(feeds) for model in (found, wanted))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_its_export_has_the_same_bytes_and_a_witness(tmp_path, large, monkeypatch):
    folder = save_encoder("bert", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"bert.{n}": t for n, t in tensors.items() if not n.startswith("pooler")}, folder / "model.safetensors")
    first = qexport.export(folder, "w8a8_dyn", out_dir=tmp_path / "large", calibration="random")
    said = json.loads((first.folder / "report.json").read_text())["export"]
    assert "a module at a time" in json.dumps(said)
    monkeypatch.setattr(encoder, "open_streamed", lambda *_: None)
    qexport.export(folder, "w8a8_dyn", out_dir=tmp_path / "small", calibration="random")
    for name in (MODEL_FILE, "model.onnx.data"):
        assert (tmp_path / "large" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


@pytest.mark.slow
def test_a_large_encoder_decoder_stays_in_its_checkpoint(tmp_path, large):
    folder = save_seq2seq("t5", tmp_path / "model")
    parts = seq2seq.capture_seq2seq(open_model(folder))
    held = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    assert parts.streamed and all(parameter.is_meta or isinstance(parameter, FakeTensor)
                                  for parameter in parts.model.parameters())  # fmt: skip
    for part in (parts.encoder, parts.decoder):
        names = {name for block in part.blocks for name in block.parameters}
        assert isinstance(part.weights, StreamedWeights) and len(names & held.keys()) > 10
        assert all(torch.equal(part.load(name), held[name]) for name in names & held.keys())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["t5", "whisper", "bart", "m2m_100", "led", "speech_to_text", "moonshine", "donut"]
)
def test_its_export_is_that_of_one_in_memory(family, tmp_path, large, monkeypatch):
    folder = save_seq2seq(family, tmp_path / "model", gain=2.0)
    spec = CalibrationSpec(source="random", samples=2, sequence_length=8, batch_size=2)
    recipe = Recipe(scheme="w8a8_static", calibration=spec)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    made = qexport.export(folder, recipe, out_dir=tmp_path / "large")  # what calibrates is written module by module
    assert "a module at a time" in made.parts["decoder"].reference.sentence()
    monkeypatch.undo()
    qexport.export(folder, recipe, out_dir=tmp_path / "small")
    for part in ("encoder", "decoder"):
        first, second = (tensors_of(tmp_path / size / part / MODEL_FILE) for size in ("large", "small"))
        assert first.keys() == second.keys()
        for name, wanted in second.items():
            # Texts are written and read by another order of sums, which ranges show in their last bit.
            rounding = 1e-6 if name.endswith("_scale") else 0
            np.testing.assert_allclose(first[name], wanted, rtol=rounding, atol=0, err_msg=name)


def tensors_of(path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_tensors_that_do_not_fit_are_refused(tmp_path, large):
    folder = save_encoder("bert", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    save_file(tensors | {name: tensors[name][:, :32].contiguous()}, folder / "model.safetensors")
    with pytest.raises(CaptureError, match="has shape .* in the checkpoint and .* by config.json"):
        capture_model(folder)
    save_file(tensors | {"encoder.layer.0.output.dense.scale": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CaptureError, match=r"encoder\.layer\.0\.output\.dense\.scale"):
        capture_model(folder)
