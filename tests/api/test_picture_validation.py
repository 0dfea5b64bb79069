"""What validation finds of a model of pictures and text as a whole: what linears of two parts cost, other forms."""

from contextlib import ExitStack

import pytest
import torch

import qexport
from helpers.noise import Noisy
from helpers.random_pictures import save_pictures_model
from qexport.api.vision_language.chain import carried_of
from qexport.api.vision_language.sources import float_feeds, load_examples
from qexport.artifact.manifest import DECODER, EMBEDDING, VISION
from qexport.calibrate.fisher import _SEED, felt
from qexport.calibrate.float_model import running
from qexport.capture.vision_language import capture_vision_language
from qexport.device import HOST
from qexport.models.source import open_model
from qexport.progress import no_stage_progress
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.validation.verdict import reference_problems

SEEING, WRITING = "model.vision_tower.encoder.layers.1.mlp.fc2", "model.language_model.layers.1.mlp.down_proj"
TEXTS = {"windows": 3, "window": 12}


def quantized(*names):
    """A recipe under which linears of these names alone are quantized."""
    overrides = [Override(match=name, scheme="w4a16_g16") for name in names]
    overrides.append(Override(match="*", scheme="float"))
    return Recipe(scheme="w4a16_g16", overrides=tuple(overrides), accuracy_level=1, weights={"method": "rtn"})


def run(captured, given, noise):
    """All outputs by public name, in one graph with zeros added to every linear."""
    values = {port.value: given[port.name] for port in captured.inputs}
    for block in captured.blocks:
        results = Noisy(block.module, noise).run(*(values[name] for name in block.inputs))
        values |= dict(zip(block.outputs, results, strict=True))
    return {port.name: values[port.value] for port in captured.outputs}


@pytest.mark.slow
def test_gradients_of_texts_go_on_through_the_encoder_of_pictures(tmp_path):
    parts = capture_vision_language(open_model(save_pictures_model("llava", tmp_path / "model", processor=False)))
    spec = CalibrationSpec(source="random", samples=3, sequence_length=9, batch_size=2)
    examples = load_examples(parts, spec, None, no_stage_progress).batches
    feeds, wanted, draws = float_feeds(parts, examples), {}, torch.Generator().manual_seed(_SEED)
    for batch, example in enumerate(examples):
        noise = {}
        with ExitStack() as stack:
            for part in parts.by_name.values():
                stack.enter_context(running(part, HOST))
            read = {part: own[batch] for part, own in feeds.items()}
            made = run(parts.embedding, read[EMBEDDING] | run(parts.vision, read[VISION], noise), noise)
            likely = torch.log_softmax(run(parts.decoder, read[DECODER] | made, noise)["logits"], -1)
            picked = torch.multinomial(likely.detach().exp().flatten(0, 1), 1, generator=draws)
            loss = -likely.gather(-1, picked.view(*example.input_ids.shape, 1))[..., 0]
            loss[:, :-1][example.written[:, 1:]].sum().backward()  # of texts alone
        for name, zeros in noise.items():
            wanted.setdefault(name, []).append(zeros.grad.flatten(0, -2).square())
    carried, seen = carried_of(parts, examples), []
    assert carried.tokens == 3 * 8
    for part in (DECODER, EMBEDDING, VISION):
        for found in felt(parts.by_name[part], feeds[part], carried=carried):
            for linear, x, importance in found.linears:
                squares = torch.cat(wanted[linear.name])
                assert x.shape == (len(squares), linear.shape[1])
                each = squares.sum(1) * len(squares) / carried.tokens
                torch.testing.assert_close(importance.rows, each, rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(importance.columns, squares.sum(0) / squares.sum(), rtol=1e-3, atol=1e-6)
                seen.append(linear.name)
    # The last layers of the encoder are behind the one that is read.
    assert sorted(seen) == sorted(wanted) and any(name.startswith("model.vision_tower") for name in seen)


@pytest.mark.slow
def test_costs_are_told_by_the_logits_of_the_text_beside_other_float_forms(tmp_path):
    model, found = save_pictures_model("llava", tmp_path / "model"), {}
    for out, names in (("one", [WRITING]), ("two", [WRITING, SEEING])):
        qexport.export(model, quantized(*names), out_dir=tmp_path / out)
        found[out] = qexport.validate(tmp_path / out, model, sensitivity=True, references=out == "one", **TEXTS)
    one, two = (found[out].sensitivity for out in ("one", "two"))
    # Of the only one all is gone when its value is the float one, and of two what the other one leaves.
    assert one.measured == {WRITING: pytest.approx(one.kl_mean, rel=1e-3)} and one.kl_mean > 1e-6
    assert two.measured[SEEING] == pytest.approx(two.kl_mean - one.kl_mean, rel=1e-2)
    assert two.tokens == 3 * 11 and found["two"].parts["vision"].sensitivity.kl_mean == pytest.approx(two.kl_mean)
    # The same texts and numbers as those of the whole, where it is measured on all of them.
    assert two.kl_mean == pytest.approx(found["two"].logits.kl_mean, rel=1e-3)
    costs = {row.name: row.kl_cost for row in found["two"].layers.linears}
    assert set(costs) == {SEEING, WRITING} and 0.3 < sum(costs.values()) / two.kl_mean < 3
    assert {override.match for override in two.overrides} == {SEEING, WRITING}
    assert any("costs the most KL" in sentence for sentence in found["two"].verdict)
    check_forms(found["one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"], "the float files are removed"


def check_forms(report):
    assert [form.name for form in report.references] == ["float16 in PyTorch", "float32 in ONNX Runtime"]
    half, single = (form.logits.kl_mean for form in report.references)
    # KL goes with the square of the unit of the dtype, 2^-26 from float16 to float32, and kernels differ.
    assert 0 < single < 2**-13 * half
    assert not reference_problems(report.references) and not report.problems
    assert any("float16 in PyTorch" in sentence for sentence in report.verdict)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paligemma2", "qwen3_vl", "idefics3"])  # of the others next tokens are too sure
def test_costs_of_other_kinds_add_up_to_what_is_measured(kind, tmp_path):
    model = save_pictures_model(kind, tmp_path / "model", processor=False)
    recipe = Recipe(scheme="w8a16_g32", accuracy_level=1, weights={"method": "rtn"})
    qexport.export(model, recipe, out_dir=tmp_path / "out")
    report = qexport.validate(tmp_path / "out", model, sensitivity=True, references=True, text="random", **TEXTS)
    check_forms(report)
    whole = report.sensitivity
    assert 0.3 < whole.kl_foretold / whole.kl_mean < 3
    assert all(report.parts[part].sensitivity.measured for part in ("vision", "decoder"))
    worst = max(report.layers.linears, key=lambda row: row.kl_cost or 0.0)
    assert whole.measured[worst.name] > 0
