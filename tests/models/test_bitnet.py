"""Ternary weights as transformers packs them are read as it unpacks them, and are 2-bit codes in the file."""

import json
from functools import partial
from importlib import import_module

import pytest
import torch

import qexport
from helpers import coded_checkpoints as packers
from helpers.random_decoders import save_model
from qexport.errors import CaptureError
from qexport.models.checkpoint import GivenCodes
from qexport.models.coded import Given, Header, format_of
from qexport.passes.weights.as_stored import proved
from qexport.recipe.recipe import Recipe

SAID = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}


@pytest.fixture(scope="module")
def bitnet():
    """Imported when it is wanted: it compiles a function, for which torch imports its compiler in two seconds."""
    return import_module("transformers.integrations.bitnet")


def ternary(bitnet, path, shape):
    """A linear at random, and the weight of it."""
    codes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(len(path)))
    scale = torch.tensor([11.3 + len(path) / 7])
    return {".weight": bitnet.pack_weights(codes.clone()), ".weight_scale": scale}, codes.double() / scale.double()


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_codes(bitnet, kind):
    parts, _ = ternary(bitnet, "a", (24, 64))
    tensors = {f"a{end}": tensor for end, tensor in parts.items()}
    headers = {"a.weight": Header("U8", (6, 64)), "a.weight_scale": Header("F32", (1,))}
    (weight,) = format_of(SAID | {"linear_class": kind}).find(headers, tensors.__getitem__)

    codes = GivenCodes(weight, tensors.__getitem__)
    found, scale = proved(codes), tensors["a.weight_scale"].item()
    with torch.compiler.set_stance("force_eager"):
        want = bitnet.unpack_weights(tensors["a.weight"], dtype=torch.float64)
    assert isinstance(found, Given) and found.weight.format.bits == 2
    assert torch.equal(found.weight.codes.double(), want)
    torch.testing.assert_close(codes.formula(), want / scale if kind == "bitlinear" else want * scale)
    tensors["a.weight"][0, 0] = 255
    with pytest.raises(CaptureError, match="codes other than -1, 0 and 1"):
        codes.decode()


@pytest.mark.parametrize("changes", [{"quantization_mode": "online"}, {"use_rms_norm": True}])
def test_other_forms_are_refused(changes):
    with pytest.raises(CaptureError, match="BitNet"):
        format_of(SAID | changes)


def stretched(weight, clip, bits):
    """What ParetoQ's linear makes of a weight, as its paper has it, in float32 but for the last product."""
    clip = clip.clamp(min=1e-5)
    if bits == 1:
        return weight.sign().double() * clip
    if bits in (0, 2):
        levels, shift = (1.5, 0) if bits == 0 else (2, 0.5)
        inside = torch.clamp(weight / clip, -0.99, 0.99) * levels - shift
        return (inside.round().double() + shift) / levels * clip
    return (weight / clip).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).double() * clip


def pareto(bits):
    def encode(path, shape):
        random = torch.Generator().manual_seed(len(path))
        weight, clip = torch.randn(shape, generator=random) / 5, 0.02 + torch.rand(shape[0], 1, generator=random) / 9
        return {".weight": weight, ".weight_clip_val": clip}, stretched(weight, clip, bits)

    return encode


@pytest.mark.parametrize(("bits", "scheme", "codes"), [
    (0, "w2a16_g64", {-1, 0, 1}), (1, "w2a16_g64", {-1, 1}), (2, "w2a16_g64", {-2, -1, 0, 1}),
    (3, "w3a16_pc", set(range(-4, 4))), (4, "w4a16_pc", set(range(-8, 8))),
])  # fmt: skip
def test_paretoq(bits, scheme, codes):
    parts, want = pareto(bits)("up", (24, 64))
    tensors = {f"a{end}": tensor for end, tensor in parts.items()}
    headers = {name: Header("F32", tuple(t.shape)) for name, t in tensors.items()}
    (weight,) = format_of({"quant_method": "paretoq", "w_bits": bits}).find(headers, tensors.__getitem__)
    found = proved(GivenCodes(weight, tensors.__getitem__))
    assert weight.scheme.name == scheme and set(found.weight.codes.unique().tolist()) == codes
    torch.testing.assert_close(found.dequantize().double(), want, rtol=2e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 2])
def test_an_export_of_paretoq(bits, tmp_path):
    """Whose config has no section on quantization."""
    folder = save_model("llama", tmp_path / "model")
    twin = packers.coded(folder, pareto(bits), {})
    config = json.loads((folder / "config.json").read_text()) | {"w_bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = Recipe.load("as_stored").model_copy(update={"accuracy_level": 1})
    result = qexport.export(folder, recipe, out_dir=tmp_path / "out")
    assert {entry.kernel for entry in result.manifest.linears} == {"MatMulNBits"}
    assert {entry.scheme.split("_")[0] for entry in result.manifest.linears} == {"w2a16"}
    report = qexport.validate(result.folder, twin, windows=1, window=16, greedy=0)
    assert report.logits.kl_mean < 1e-9


@pytest.mark.slow
def test_the_exported_file(bitnet, tmp_path):
    folder = save_model("llama", tmp_path / "model")
    twin = packers.coded(folder, partial(ternary, bitnet), SAID)
    recipe = Recipe.load("as_stored").model_copy(update={"accuracy_level": 1})
    result = qexport.export(folder, recipe, out_dir=tmp_path / "out")
    assert {entry.kernel for entry in result.manifest.linears} == {"MatMulNBits"}
    assert {entry.scheme.split("_")[0] for entry in result.manifest.linears} == {"w2a16"}
    report = qexport.validate(result.folder, twin, windows=1, window=16, greedy=0)
    assert report.logits.kl_mean < 1e-9
