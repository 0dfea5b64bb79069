"""A quantized model trained end to end: it comes closer to the float one, and what was trained is what is deployed."""

import json

import pytest
import torch
from torch.fx import Graph, GraphModule

from helpers import exports
from helpers.exports import session_runner
from helpers.runners import captured_runner, load_weights, prompt_feeds, tokens
from qexport.artifact.manifest import load
from qexport.calibrate.tuned_block import Rates, TunedRun, find_tuned, gradients
from qexport.calibrate.tuning import kl_and_gradient
from qexport.errors import InputError, PassError
from qexport.passes.formats import form_for
from qexport.quant.dequantize_through import dequantize_through
from qexport.quant.formats import QuantizedWeight, Scheme
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.recipe.sections import TuneSpec
from qexport.runtime.session import open_session
from qexport.validation.account import transforms
from qexport.validation.reference import check_same_model

CALIBRATION = CalibrationSpec(source="random", samples=16, sequence_length=32, batch_size=2)


def recipe(scheme="w3a16_g32_asym", weights=None, **tune):
    given = {"steps": 12, "batches": 2, "check_every": 12, "rate": 0.015, "norm_rate": 0.015} | tune
    return Recipe(
        scheme=scheme, lm_head="w4a16_g32", embedding="tied", weights=weights or section("weights"),
        calibration=CALIBRATION, tune=TuneSpec(**given),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "size", "groups"), [(0, 16, (3, 6)), (1, 0, (6,)), (1, 0, ())], ids=["groups, last shorter", "rows", "one"]
)
def test_codes_become_what_the_operator_makes_of_them_and_gradients_are_those_of_the_formula(axis, size, groups):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 6), generator=random).to(torch.uint8)
    scale = torch.rand(groups, generator=random) + 0.1
    zero = torch.randint(0, 16, groups, generator=random).to(torch.uint8)
    expected = torch.ops.qexport.dequantize_linear(codes, scale, zero, axis, size, 4)
    parts = [codes.float().requires_grad_(), scale.clone().requires_grad_(), zero.float().requires_grad_()]
    values, weights = dequantize_through(*parts, axis, size), torch.randn(40, 6, generator=random)
    assert torch.equal(values, expected)
    found = torch.autograd.grad((values * weights).sum(), parts)

    wide = [p.detach().double().requires_grad_() for p in parts]
    spread = [t.repeat_interleave(size, 0)[:40] if size else t for t in wide[1:]]
    by_hand = torch.autograd.grad((((wide[0] - spread[1]) * spread[0]) * weights.double()).sum(), wide)
    for one, other in zip(found, by_hand, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_kl_is_that_of_autograd_and_padding_has_none():
    random = torch.Generator().manual_seed(0)
    wanted, logits = torch.randn(2, 3, 7, generator=random), torch.randn(2, 3, 7, generator=random).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    p, q = wanted.double().log_softmax(-1), logits.double().log_softmax(-1)
    by_hand = (p.exp() * (p - q)).sum(-1)[mask].sum()
    found, gradient = kl_and_gradient(wanted, logits, mask)
    assert found == pytest.approx(float(by_hand.detach()), rel=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(by_hand, logits)[0], atol=1e-6)
    assert not gradient[0, 2].any()


def test_values_of_a_table_become_what_the_operator_makes_of_them_and_scales_have_their_gradient():
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 48), generator=random).to(torch.uint8)
    scale, weights = torch.rand(6, 3, generator=random) + 0.1, torch.randn(48, 6, generator=random)
    module, fmt = GraphModule({}, Graph()), Scheme.parse("nf4_g16").weight
    module.graph.output((form_for(fmt).insert(module, "a", QuantizedWeight(codes, scale, None, fmt)),))
    tuned = find_tuned(module, Rates(0.1, 0, 0, 0.1), module.get_buffer)
    assert set(tuned) == {"a.weight_scale"}  # codes of a table are no numbers that could move
    run = TunedRun(module, tuned)
    (values,) = run.run()
    assert torch.equal(values, torch.ops.qexport.dequantize_codebook(codes, scale, "nf4", 16))
    found, _ = gradients(run, [], [(values, weights)])
    table = fmt.table().double()[codes.int()].view(6, 3, 16)
    of_scale = (table * weights.t().double().view(6, 3, 16)).sum(-1)
    # What is trained is the logarithm of the share by which a scale changes.
    assert torch.allclose(found["a.weight_scale"].double(), of_scale * scale.double(), rtol=1e-4, atol=1e-6)


def said(exported):
    return json.loads((exported.folder / "report.json").read_text())["export"].get("tuned")


def test_a_tuned_model_is_closer_to_the_float_one_and_what_was_trained_is_deployed(
    captured, export_folder, tmp_path
):
    plain = export_folder("llama", recipe().model_copy(update={"tune": None}))
    tuned = exports.export(captured("llama"), recipe(code_rate=0.02), "cpu", tmp_path / "tuned")
    found = said(tuned)
    assert found["after"] < 0.9 * found["before"] and found["step"] == 12 and found["tokens"] == 64
    assert "tuned" not in json.loads((plain / "report.json").read_text())["export"]
    assert tuned.manifest.bytes["model"] == load(plain).bytes["model"]
    feeds = prompt_feeds(captured("llama"), tokens(4, 32), torch.ones(4, 32, dtype=torch.int64))
    rounded = session_runner(open_session(plain, load(plain), threads=1))
    logits = {
        name: run(feeds)["logits"]
        for name, run in (
            ("float", captured_runner(load_weights(captured("llama")))), ("plain", rounded),
            ("tuned", tuned.in_onnxruntime()), ("graph", tuned.in_pytorch()),
        )
    }  # fmt: skip
    kl = {name: kl_and_gradient(logits["float"], value, None)[0] for name, value in logits.items()}
    assert kl["tuned"] < 0.9 * kl["plain"] and kl["tuned"] == pytest.approx(kl["graph"], rel=0.05)
    # Its norms are not the model's, and it is that model all the same.
    check_same_model(captured("llama"), tuned.manifest, tuned.folder, transformed=transforms(tuned.folder))
    with pytest.raises(InputError, match="norm.weight has other values"):
        check_same_model(captured("llama"), tuned.manifest, tuned.folder, transformed=False)


@pytest.mark.slow
def test_what_was_interrupted_is_tuned_again_to_the_same_bytes(captured, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, what, done, total):
        if stage == "tune" and what.startswith("step 3"):
            raise Stop

    short = recipe(steps=3)
    whole = exports.export(captured("llama"), short, "cpu", tmp_path / "whole")
    with pytest.raises(Stop):
        exports.export(captured("llama"), short, "cpu", tmp_path / "parts", progress=stop)
    parts = exports.export(captured("llama"), short, "cpu", tmp_path / "parts", resume=True)
    for file in ("model.onnx", "model.onnx.data"):
        assert (whole.folder / file).read_bytes() == (parts.folder / file).read_bytes()


def test_what_cannot_be_tuned_says_why(captured, tmp_path):
    with pytest.raises(PassError, match="rounds activations or the cache, and no gradient comes back") as caught:
        exports.export(captured("llama"), recipe("w8a8_dyn"), "cpu", tmp_path / "a")
    assert caught.value.place.startswith("model.layers.0") and "Leave out tune" in caught.value.remedy
    few = recipe().with_calibration(samples=2)
    with pytest.raises(InputError, match="has 1 batch, but tune sets one aside"):
        exports.export(captured("llama"), few, "cpu", tmp_path / "b")


def test_steps_that_bring_nothing_leave_the_model_as_it_was(captured, export_folder, tmp_path):
    plain = export_folder("llama", recipe().model_copy(update={"tune": None}))
    wild = exports.export(captured("llama"), recipe(rate=1.0, norm_rate=1.0, steps=2), "cpu", tmp_path / "wild")
    assert said(wild)["step"] == 0 and said(wild)["after"] == said(wild)["before"]
    assert (plain / "model.onnx.data").read_bytes() == (wild.folder / "model.onnx.data").read_bytes()
