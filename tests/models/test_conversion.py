"""Checkpoints under other names than the model's: read one weight, or one expert, at a time."""

import tempfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.random_decoders import save_model
from qexport.capture.folder import capture_folder
from qexport.capture.weight_views import WeightViews
from qexport.errors import CaptureError
from qexport.models.checkpoint import Checkpoint
from qexport.models.source import open_model

KIND = "model.layers.1.mlp.experts"


@pytest.fixture
def folder(tmp_path):
    return save_model("qwen3_moe", tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("mixtral", "phimoe", "granitemoe", "gpt_oss", "deepseek_v3", "minimax_m2", "mimo_v2", "hunyuan_moe")
)])  # fmt: skip
def test_weights_are_those_that_transformers_makes(family, tmp_path):
    folder = save_model(family, tmp_path)
    captured = capture_folder(open_model(folder))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    table = captured.weights.table if isinstance(captured.weights, WeightViews) else {}
    for name in {name for block in captured.blocks for name in block.parameters} - captured.constants.keys():
        whole = wanted[table[name].source if name in table else name]
        assert torch.equal(captured.load(name), table[name].of(whole) if name in table else whole), name


def test_an_expert_is_read_alone_and_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing-may-be-written"))
    captured, read = capture_folder(open_model(folder)), []
    part = Checkpoint._part
    monkeypatch.setattr(
        Checkpoint, "_part", lambda self, name, index=None: read.append(name) or part(self, name, index)
    )
    captured.load(f"{KIND}.2.gate_up_proj.weight")
    assert read == [f"{KIND}.2.gate_proj.weight", f"{KIND}.2.up_proj.weight"]


def test_a_missing_expert(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{KIND}.2.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CaptureError) as refused:
        capture_folder(open_model(folder))
    assert refused.value.place == f"{KIND}.gate_up_proj"
    assert "cannot be built from" in refused.value.message


def test_all_experts_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith(f"{KIND}.")}, folder / "model.safetensors")
    with pytest.raises(CaptureError, match=f"2 weights are not in the checkpoint, first {KIND}"):
        capture_folder(open_model(folder))
