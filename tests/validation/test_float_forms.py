"""Other forms of the float model: float16 in PyTorch, float in ONNX Runtime, and what they prove."""

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.random_decoders import save_model
from helpers.runners import tokens
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import CPU
from qexport.errors import InputError
from qexport.quant.metrics import kl_divergence
from qexport.recipe.recipe import Recipe
from qexport.runtime.decoder import Decoder
from qexport.validation import float_forms
from qexport.validation.float_forms import compare_forms, half_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.verdict import reference_problems

WINDOWS = tokens(2, 40)


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request, model_folder):
    return model_folder(request.param)


@pytest.fixture(scope="module")
def llama(model_folder):
    return model_folder("llama")


@pytest.fixture(scope="module")
def exported(export_folder):
    return export_folder("llama", Recipe(scheme="w8a16_g32"))


def forms(model, folder):
    """The other forms of the float model beside an export of it."""
    captured, manifest = capture_model(model), manifests.load(folder)
    reference = FloatOutputs(captured, decoder_feeds(captured, WINDOWS), ("logits",))
    try:
        return compare_forms(captured, manifest, folder, reference, WINDOWS, threads=1, provider=CPU)
    finally:
        reference.close()


def test_half_is_the_float16_model_of_transformers(model):
    single, half = (AutoModelForCausalLM.from_pretrained(model, dtype=d).eval() for d in (torch.float32, torch.float16))
    captured, ours, theirs = capture_model(model), [], []
    with half_logits(captured, WINDOWS) as run, torch.no_grad():
        for ids in WINDOWS:
            want = single(ids[None]).logits[0]
            ours.append(kl_divergence(want, run(ids)))
            theirs.append(kl_divergence(want, half(ids[None]).logits[0].float()))
    ours, theirs = (torch.cat(found).mean() for found in (ours, theirs))
    # They round at the same places but inside of fused operators.
    assert theirs > 1e-7 and 0.3 < ours / theirs < 3


def test_the_copy_in_float16_leaves_the_model_as_it_is(llama):
    captured = capture_model(llama)
    reference = FloatOutputs(captured, decoder_feeds(captured, WINDOWS), ("logits",))
    before = reference.outputs(0)["logits"]
    with half_logits(captured, WINDOWS) as run:
        assert not torch.equal(run(WINDOWS[0]), before[0])
    assert torch.equal(reference.outputs(0)["logits"], before) and before.dtype == torch.float32


@pytest.mark.by_default("gpt_neox-grouped")
@pytest.mark.parametrize("family, attention", [("llama", "standard"), ("gpt_neox", "grouped")])
def test_the_float_file_is_the_float_model_to_rounding(tmp_path, family, attention):
    model = save_model(family, tmp_path / "models" / family)
    export(model, Recipe(scheme="w8a16_g32"), out_dir=tmp_path / "exports" / "out", attention=attention)
    found, left_out = forms(model, tmp_path / "exports" / "out")
    assert [form.name for form in found] == ["float16 in PyTorch", "float32 in ONNX Runtime"] and not left_out
    half, single = (form.logits.kl_mean for form in found)
    # KL goes with the square of the unit of the dtype, 2^-26 from float16 to float32, and kernels differ.
    assert 0 < single < 2**-18 * half
    assert found[1].logits.top1_agreement == 1 and not reference_problems(found)
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["out"], "the float file is removed"


def test_the_float_file_of_a_cuda_export_is_float16(llama, tmp_path):
    export(llama, Recipe(scheme="w8a16_g32"), out_dir=tmp_path / "out", target="cuda")
    found, _ = forms(llama, tmp_path / "out")
    assert found[1].name == "float16 in ONNX Runtime" and not reference_problems(found)
    assert 0.1 < found[1].logits.kl_mean / found[0].logits.kl_mean < 10


def test_an_epsilon_that_is_slightly_off_is_a_problem(llama, exported, monkeypatch):
    made = float_forms.export_float

    def wrong(captured, like, folder, progress):
        manifest = made(captured, like, folder, progress)
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        epsilons = [a for node in model.graph.node for a in node.attribute if a.name == "epsilon"]
        assert epsilons
        for attribute in epsilons:
            attribute.f = 1e-4
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return manifest

    monkeypatch.setattr(float_forms, "export_float", wrong)
    (problem,) = reference_problems(forms(llama, exported)[0])
    assert problem.startswith("without any quantization the lowered model is not the float model either: KL of float32")


def test_a_decode_step_that_sees_too_little_is_a_problem(llama, exported, monkeypatch):
    append = Decoder._append

    def short(self, ids, new):
        mask, positions = append(self, ids, new)
        return (mask[:, 1:] if self.past else mask), positions

    monkeypatch.setattr(Decoder, "_append", short)
    assert len(reference_problems(forms(llama, exported)[0])) == 1


def test_a_float_file_that_would_not_fit_is_left_out_and_said_so(llama, exported, monkeypatch):
    monkeypatch.setattr(float_forms, "fits_in_memory", lambda captured: False)
    found, left_out = forms(llama, exported)
    assert len(found) == 1 and left_out[0].startswith("float32 in ONNX Runtime was left out")


def test_an_operator_without_a_float16_kernel_is_an_error_with_a_remedy(llama, monkeypatch):
    def missing(*given):
        raise RuntimeError("\"tanh_cpu\" not implemented for 'Half'\nand more")

    monkeypatch.setattr(float_forms, "FloatOutputs", missing)
    captured = capture_model(llama)
    with pytest.raises(InputError, match="tanh_cpu.*Validate without references"), half_logits(captured, WINDOWS):
        pass
