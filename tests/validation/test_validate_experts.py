"""Validation and --auto on files in which experts make no value of their own."""

import pytest
import torch

import qexport
from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.artifact import manifest as manifests
from qexport.mixed_precision.allocator import PricedModel, SchemeAllocator
from qexport.recipe.recipe import Recipe
from qexport.targets.cpu import CpuTarget
from qexport.validation.kl_costs import deployed_costs
from qexport.validation.placement import examine
from qexport.validation.probes import make_probes
from qexport.validation.reference import decoder_feeds

TEXT = " ".join(f"w{i * i % 97}" for i in range(600))
RTN = Recipe(scheme="w4a16_g32", lm_head="w4a16_g32").with_calibration(samples=2, sequence_length=32)
INSIDE = 2 * 4 * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model("mixtral", tmp_path_factory.mktemp("mixtral") / "model")
    write_word_tokenizer(folder, 128)
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return qexport.export(model, RTN, out_dir=tmp_path_factory.mktemp("exported") / "out").folder


@pytest.fixture(scope="module")
def report(model, exported):
    return qexport.validate(exported, model, text=TEXT, windows=2, window=32, greedy=4, sensitivity=True)


def test_one_sentence_says_what_is_not_compared_and_everything_else_is(report, exported):
    assert not report.problems
    (said,) = [sentence for sentence in report.verdict if "inside QMoE" in sentence]
    assert said.startswith(f"{INSIDE} linears are inside QMoE, which makes no value of each to compare")
    assert report.placement.kernels == {"QMoE": INSIDE, "MatMulNBits": 9} and not report.placement.unfused
    rows = {row.name for row in report.layers.linears}
    assert len(rows) == 9 and not any(".experts." in name for name in rows)
    assert all(row.sqnr_db is not None for row in report.layers.linears)
    layers = [row for row in report.layers.blocks if "layers" in row.name]
    assert len(layers) == 2 and all(5 < row.own_sqnr_db < 40 for row in layers)
    assert report.layers.time_by_op["QMoE"] > 0
    page = (exported / "report.html").read_text()
    assert "inside QMoE" in page


def test_costs_are_measured_of_what_can_be_read(report):
    costed = [row for row in report.layers.linears if row.kl_cost is not None]
    assert len(costed) == 9
    assert any("of the estimates for all linears but experts" in sentence for sentence in report.verdict)


def test_a_mixture_that_is_not_there_is_a_problem(exported):
    manifest = manifests.load(exported)
    elsewhere = [e.model_copy(update={"node": "gone"}) if not e.output else e for e in manifest.linears]
    placed, _ = examine(exported, manifest.model_copy(update={"linears": tuple(elsewhere)}), manifest.provider)
    assert {found.expected for found in placed.unfused} == {"QMoE"} and len(placed.unfused) == INSIDE
    assert all(found.found is None for found in placed.unfused)


def test_probes_ask_for_no_value_of_an_expert(captured, exported):
    manifest = manifests.load(exported)
    values = [value for probe in make_probes(captured("mixtral"), manifest, 32) for value in probe.values()]
    assert "" not in values and not any(".experts." in value for value in values)


def test_costs_of_a_file_leave_experts_out_and_choosing_goes_on_without(captured, exported):
    model, manifest = captured("mixtral"), manifests.load(exported)
    feeds = decoder_feeds(model, torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(0)))
    chooser = SchemeAllocator([PricedModel(model, RTN, CpuTarget.candidates, 4, "grouped", feeds, lambda *_: None)])
    silent = dict(transformed=False, progress=lambda *_: None)
    costs = deployed_costs(exported, manifest, model, feeds, chooser.importance, **silent)
    assert len(costs) == 9 < len(chooser.importance) and not any(".experts." in name for name in costs)
    best = chooser.best()
    before = chooser.within_kl(1.0)
    chooser.learn(best, costs, 0.1)
    assert before is not None and chooser.within_kl(1.0) is not None


@pytest.mark.slow
def test_schemes_are_chosen_though_experts_cannot_be_measured(model, exported, tmp_path):
    size = int(1.3 * sum(file.stat().st_size for file in exported.glob("model.onnx*")))
    found = qexport.export_auto(
        model, RTN, out_dir=tmp_path / "auto", max_bytes=size, text=TEXT, windows=2, window=32, calibration="random"
    )
    assert found.logits.kl_mean > 0 and len(found.schemes) == 9 + INSIDE
    assert not found.export.dense  # all experts of a layer have one scheme
    for layer in range(2):
        assert len({s for n, s in found.schemes.items() if f"layers.{layer}.mlp.experts." in n}) == 1
    assert found.export.manifest.bytes["model"] <= size
