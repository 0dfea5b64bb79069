"""The device that PyTorch computes on: no tensor is made on the wrong side, and results are those of the CPU."""

import numpy as np
import onnx
import pytest
import torch

import qexport
from helpers.breadth import quick
from helpers.random_modules import example_inputs, make_module, save_encoder
from helpers.stand_in_device import MixedDevices, stand_in_device
from qexport.api.stages.capturing import capture_model
from qexport.artifact.manifest import MODEL_FILE
from qexport.calibrate import float_model
from qexport.calibrate.own_text import own_text
from qexport.device import CPU, HOST, Placement, computing, placement_of
from qexport.errors import InputError
from qexport.progress import no_stage_progress
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.tensors import tensor_of

CALIBRATION = CalibrationSpec(source="self", samples=3, sequence_length=12, batch_size=2)
INTEGERS = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
QUICK = ("llm_int8", "balanced")
# Adam's steps are as long where a gradient is rounding alone: codes of the two sides grow apart from step to step.
TRAINED = ("w4a16_g64_zq_global",)
ROTATED = Recipe(scheme="w8a8_dyn", rotation={}, kv_cache=section("kv_cache", bits=8), weights={"method": "gptq"})
NO_MEMORY = (
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
)  # fmt: skip


def presets() -> list:
    """Parameters of a test: QUICK, and all other recipes of the package that make codes marked slow."""
    return quick(QUICK, among=[name for name in qexport.Recipe.presets() if name not in ("as_stored", *TRAINED)])


def small(recipe: str | Recipe) -> Recipe:
    found = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return found.model_copy(update={"calibration": CALIBRATION})


def values_of(folder) -> dict[str, tuple[bool, np.ndarray]]:
    """By name, whether a tensor of a file holds codes, and its values."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    return {t.name: (t.data_type in INTEGERS, tensor_of(t, folder).astype(np.float64)) for t in graph.initializer}


def assert_alike(on_device, on_host) -> None:
    """Codes are equal to 99.9 %: sums in another order turn one now and then; floats to rounding."""
    found, wanted = values_of(on_device), values_of(on_host)
    assert found.keys() == wanted.keys()
    pairs = [(found[name][1], values) for name, (codes, values) in wanted.items() if codes]
    equal, count = sum((a == b).sum() for a, b in pairs), sum(a.size for a, _ in pairs)
    assert count and equal >= 0.999 * count
    for name, (codes, values) in wanted.items():
        if not codes:
            np.testing.assert_allclose(found[name][1], values, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.fixture
def on_both(tmp_path):
    """on_both(model, recipe, offload=(False,), **options): exports on the stand-in are like the one on the CPU."""

    def check(model, recipe, *, offload=(False,), **options):
        host, there = (tmp_path / side for side in ("host", "there"))
        qexport.export(model, recipe, out_dir=host, **options)
        for waits in offload:
            with stand_in_device() as device:
                qexport.export(model, recipe, out_dir=there / str(waits), device=device, offload=waits, **options)
            assert_alike(there / str(waits), host)

    return check


def test_the_stand_in_refuses_tensors_of_the_host():
    with stand_in_device() as device:
        there = torch.ones(2, 3, device=device)
        assert there.device.type == "standin" and (there + 1).sum().item() == 12
        assert (there * torch.tensor(2.0)).cpu().equal(torch.full((2, 3), 2.0))  # as on a GPU
        with pytest.raises(MixedDevices, match="of the CPU"):
            there + torch.ones(3)
        with pytest.raises(MixedDevices, match="numpy"):
            there.numpy()
        with pytest.raises(MixedDevices, match="generator"):
            torch.rand(2, device=device, generator=torch.Generator())


@pytest.mark.parametrize("recipe", presets())
def test_every_preset(on_both, model_folder, recipe):
    on_both(model_folder("llama"), small(recipe), offload=(False, True) if recipe in QUICK else (False,))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        pytest.param("llama", ROTATED, marks=pytest.mark.slow),
        pytest.param("mixtral", "w4a16_g32", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "w8a8_static", marks=pytest.mark.slow),
        pytest.param("bloom", "w8a8_static", marks=pytest.mark.slow),
    ],
)
def test_families_and_what_presets_leave_out(on_both, model_folder, family, recipe):
    on_both(model_folder(family), small(recipe))


@pytest.mark.slow
def test_activations_may_wait_on_the_host(on_both, model_folder):
    on_both(model_folder("llama"), small("w4a16_g32"), offload=(True,))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINED)
def test_what_is_trained_there_is_as_near_to_the_float_model(tmp_path, model_folder, recipe):
    model, found = model_folder("llama"), {}
    qexport.export(model, small(recipe), out_dir=tmp_path / "host")
    for offload in (False, True):
        with stand_in_device() as device:
            qexport.export(model, small(recipe), out_dir=tmp_path / str(offload), device=device, offload=offload)
    for side in ("host", "False", "True"):
        report = qexport.validate(tmp_path / side, model, windows=1, window=64, greedy=0)
        found[side] = report.logits.kl_mean
    assert found["True"] == found["False"]
    assert found["False"] < 1.15 * found["host"]  # 0.94 when this was written


@pytest.mark.slow
def test_encoders_modules_and_encoder_decoders(on_both, tmp_path):
    encoder = small("w8a8_static").with_calibration(source="random")
    on_both(save_encoder("bert", tmp_path / "bert"), encoder, overwrite=True)
    inputs = example_inputs("whisper_encoder")
    options = {"example_inputs": inputs, "calibration": [inputs], "overwrite": True}
    on_both(make_module("whisper_encoder"), small("w8a8_static"), **options)


@pytest.mark.slow
def test_the_float_reference_of_a_validation(model_folder, export_folder):
    folder = export_folder("llama", "w8a8_dyn")
    asked = {"windows": 1, "window": 24, "greedy": 0, "sensitivity": True}
    want = qexport.validate(folder, model_folder("llama"), **asked)
    with stand_in_device() as device:
        got = qexport.validate(folder, model_folder("llama"), device=device, **asked)
    assert got.logits.kl_mean == pytest.approx(want.logits.kl_mean, rel=1e-4)
    for one, other in zip(got.layers.linears, want.layers.linears, strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=1e-3)
        assert one.kl_cost == pytest.approx(other.kl_cost, rel=1e-3)


def test_a_dry_run(model_folder):
    with stand_in_device() as device:
        found = qexport.inspect(model_folder("llama"), small("fptq"), calibrate=True, device=device)
    assert found.as_dict() == qexport.inspect(model_folder("llama"), small("fptq"), calibrate=True).as_dict()


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "gpu: there is no device of this name. Devices are cpu, cuda"),
        ("meta", "meta: nothing can be computed there"),
        pytest.param(
            "cuda:63", "cuda:63: PyTorch .* cannot compute there .*Use another device, such as cpu",
        ),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_said_before_anything_is_read(device, said, tmp_path):
    with pytest.raises(InputError, match=said) as raised:
        qexport.export(tmp_path / "no model", out_dir=tmp_path / "out", device=device)
    assert "\n" not in str(raised.value)


def test_the_cpu_by_another_name():
    assert placement_of("cpu:0") == placement_of("cpu") == HOST and HOST.between == CPU


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_lack_of_memory_says_what_to_lower(error):
    gpu = torch.device("cuda", 0)
    for placement, where, offload in ((HOST, "memory", False), (Placement(gpu), "the memory of cuda:0", True),
                                      (Placement(gpu, offload=True), "the memory of cuda:0", False)):  # fmt: skip
        said = f"layers.3: does not fit into {where}. .*--samples"
        with pytest.raises(InputError, match=said) as raised, computing("layers.3", placement):
            raise error
        assert ("--offload" in str(raised.value)) == offload
    with pytest.raises(RuntimeError, match="else"), computing("layers.3", HOST):
        raise RuntimeError("something else")


def test_text_is_written_where_the_model_fits_and_else_a_block_at_a_time(model_folder, monkeypatch):
    host = own_text(capture_model(model_folder("llama")), CALIBRATION, no_stage_progress, "")
    with stand_in_device() as device:
        captured = capture_model(model_folder("llama"), placement=placement_of(device))
        monkeypatch.setattr(float_model, "_free", lambda device: 1 << 40 if device == CPU else 1000)
        assert float_model.where_whole(captured) == HOST
        monkeypatch.setattr(float_model, "_free", lambda device: 1000)
        assert float_model.where_whole(captured) is None
        there = own_text(captured, CALIBRATION, no_stage_progress, "")
    assert torch.equal(there.input_ids, host.input_ids)
