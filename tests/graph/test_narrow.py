"""Weights that wait in 16 bits are float32 to whoever computes with them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport import export
from qexport.calibrate import float_model
from qexport.graph import execution
from qexport.graph.narrow import NarrowTensor, narrowed_exactly, same_memory, widened
from qexport.recipe.recipe import CalibrationSpec, Recipe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_as_float32(dtype):
    whole = torch.randn(6, 4).to(dtype).float()
    kept, x = narrowed_exactly(whole), torch.randn(3, 4)
    assert isinstance(kept, NarrowTensor) and kept.held.dtype == dtype and kept.dtype == torch.float32
    assert torch.equal(torch.nn.functional.linear(x, kept), torch.nn.functional.linear(x, whole))
    assert torch.equal(kept.t()[torch.tensor([1, 0])], whole.t()[:2].flip(0))
    assert torch.equal(widened(kept), whole) and type(kept / 2) is torch.Tensor
    assert same_memory(kept.detach(), kept) and not same_memory(kept / 1, kept)
    assert kept.to("meta").shape == whole.shape and type(kept.to("meta")) is torch.Tensor


def test_what_16_bits_do_not_hold_stays():
    whole = torch.tensor([1 + 2**-12, 2**-40])
    assert narrowed_exactly(whole) is whole


@pytest.mark.by_default("gptq")
@pytest.mark.parametrize(
    "method", ["rtn", "gptq", *(pytest.param(m, marks=pytest.mark.slow) for m in ("hqq", "zq_local"))]
)
def test_an_export_of_narrow_weights_is_the_same(model_folder, tmp_path, monkeypatch, method):
    folder = shutil.copytree(model_folder("qwen3_moe"), tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    calibration = CalibrationSpec(source="random", samples=2, sequence_length=16)
    recipe = Recipe(scheme="w4a16_g32", weights={"method": method}, calibration=calibration)
    made, kept = [], []
    narrow = float_model.narrowed_exactly
    monkeypatch.setattr(float_model, "_WORTH_IT", 0)
    monkeypatch.setattr(float_model, "narrowed_exactly", lambda tensor: kept.append(narrow(tensor)) or kept[-1])
    for limit in (float_model._WAITS_NARROW, 0):
        monkeypatch.setattr(float_model, "_WAITS_NARROW", limit)
        monkeypatch.setattr(execution, "_KEPT", limit)
        out = tmp_path / str(limit)
        export(folder, recipe, out_dir=out)
        made.append([(out / name).read_bytes() for name in ("model.onnx", "model.onnx.data")])
        assert bool(kept) == (limit == 0)
    assert made[0] == made[1] and sum(isinstance(tensor, NarrowTensor) for tensor in kept) > 20
