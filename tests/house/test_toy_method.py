"""A weight method in one file outside of the package, which recipes, inspect, export, validate and --auto take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
import yaml
from pydantic import Field
from torch.fx import GraphModule, Node

import qexport
from helpers import exports
from helpers.pass_runs import run_passes, stream_of
from helpers.random_decoders import reference_model, save_model
from helpers.runners import load_weights, tokens
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api import measuring
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.recipe_passes import passes_for
from qexport.errors import RecipeError
from qexport.graph.edit import get_tensor
from qexport.graph.sites import linears
from qexport.passes.base import Context, GraphPass, PassResult
from qexport.passes.weights.rounding import planned, quantize_linears
from qexport.plan.linear_plan import LinearPlan
from qexport.plan.model_plan import plan_for
from qexport.quant.affine import encode, grouped
from qexport.quant.formats import IntegerFormat, QuantizedWeight
from qexport.quant.metrics import sqnr_db
from qexport.quant.observers import ChannelMeanAbs
from qexport.recipe.methods import WeightMethod
from qexport.recipe.recipe import Recipe
from qexport.recipe.registry import method
from qexport.validation.text import Text

# ---- the method -----------------------------------------------------------------------------------------------------


@method("weights", "absmean")
class AbsMeanSection(WeightMethod):
    """Scales by the mean magnitude of the weights of a group, each counted by the mean magnitude of its input.

    Attributes:
        reach: of the largest code, in means of its group.
    """

    reach: float = Field(3.0, gt=0)
    calibrates: ClassVar[bool] = True
    kl_left: ClassVar[float] = 1.5

    def check(self, recipe: Recipe) -> None:
        if crooked := next((s.name for s in recipe.schemes if not s.weight.symmetric), None):
            raise ValueError(f"absmean has no zero points, and {crooked} has", "Take a scheme without asym")

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        return [RoundByMean(plan, self.reach)]

    def table_statistic(self) -> ChannelMeanAbs:
        return ChannelMeanAbs()

    def round_table(self, table: torch.Tensor, fmt: IntegerFormat, seen: ChannelMeanAbs | None) -> QuantizedWeight:
        return absmean(table, fmt, self.reach, torch.ones(table.shape[1]) if seen is None else seen.mean())


@dataclass(frozen=True)
class RoundByMean(GraphPass):
    plan: Mapping[str, LinearPlan]
    reach: float
    preserves_values: ClassVar[bool] = True

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {linear.input: ChannelMeanAbs for linear in linears(module.graph) if planned(self.plan, linear)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        means = {value: statistic.mean() for value, statistic in context.statistics.items()}
        return quantize_linears(
            module, self.plan, context.handover,
            lambda linear, w, fmt, factor: absmean(w, fmt, self.reach, means[linear.input]),
        )  # fmt: skip


def absmean(w: torch.Tensor, fmt: IntegerFormat, reach: float, counts: torch.Tensor) -> QuantizedWeight:
    counts = counts.view(1, *grouped(w[:1], fmt).shape[1:])
    scale = (grouped(w, fmt).abs() * counts).sum(-1) / counts.sum(-1) * (reach / fmt.qmax)
    return QuantizedWeight(encode(w, scale, None, fmt), scale, None, fmt)


# ---- what becomes of it ---------------------------------------------------------------------------------------------

CALIBRATION = {"source": "random", "samples": 4, "sequence_length": 32}
FIELDS = {"name": "toy", "scheme": "w4a16_g32", "calibration": CALIBRATION, "accuracy_level": 1}
RECIPE = Recipe(**FIELDS, weights={"method": "absmean", "reach": 2.5})
IDS = tokens(1, 40, seed=3)


TIED = FIELDS | {"lm_head": "w4a16_g32", "embedding": "tied", "weights": {"method": "absmean"}}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The folder of a decoder whose embedding is its output projection."""
    folder = save_model("llama_bias", tmp_path_factory.mktemp("tied"))
    write_word_tokenizer(folder, 128)
    return folder


def test_a_file_names_it_and_its_keys(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(FIELDS) + "weights:\n  method: absmean\n  reach: 2.5\n")
    recipe = Recipe.load(file)
    assert recipe == RECIPE and recipe.needs_calibration
    assert yaml.safe_load(recipe.to_yaml())["weights"] == {"method": "absmean", "reach": 2.5}
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file) == recipe


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"method": "absmean", "reech": 1}, r"^weights\.reech: unknown key\. Did you mean reach\?$"),
        (
            {"method": "absmean", "steps": 1},
            r"^weights\.steps: steps is not a key of absmean, but of autoround, .*zq_global and",
        ),
        (
            {"reach": 1},
            r"^weights\.reach: reach is not a key of rtn, but of absmean\. Remove it, or",
        ),
        ({"method": "absmean", "reach": 0}, r"^weights\.reach: input should be greater than 0, not 0$"),
        ({"method": "absmeen"}, r"^weights\.method: input should be 'absmean', .*, 'gptq', .* not 'absmeen'$"),
    ],
)
def test_what_is_wrong_with_its_section_is_said(weights, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**FIELDS, weights=weights)


def test_it_refuses_what_it_does_not_go_with():
    with pytest.raises(RecipeError, match=r"absmean has no zero points, and w4a16_g32_asym has\. Take a scheme"):
        Recipe(scheme="w4a16_g32_asym", weights={"method": "absmean"})


def test_its_name_is_given_once():
    with pytest.raises(RecipeError, match=r"absmean of weights is registered twice, by .*test_toy_method and by "):

        @method("weights", "absmean")
        class Another(AbsMeanSection):
            pass


def test_inspect_says_that_it_calibrates(model_folder):
    found = qexport.inspect(model_folder("llama"), RECIPE)
    assert found.calibrates and {p.scheme.name for p in found.linears if p.scheme} == {"w4a16_g32"}


def watched(model, ids, names):
    """What linears read, and what they make, on ids, by name; and the logits."""
    reads, makes = {}, {}

    def watch(name):
        def hook(module, given, made):
            reads[name], makes[name] = given[0], made

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    with torch.no_grad():
        logits = model(ids).logits
    return reads, makes, logits


def test_the_file_holds_its_codes_and_validate_finds_the_errors_that_they_make(captured, model_folder, tmp_path):
    folder, fmt, ids = model_folder("llama"), IntegerFormat(4, 32), tokens(4, 32, seed=5)
    manifest = qexport.export(folder, RECIPE, out_dir=tmp_path / "out", calibration=ids).manifest
    names = [entry.name for entry in manifest.linears]
    passed = load_weights(captured("llama"))
    plan = {linear.name: linear for linear in plan_for(passed, RECIPE)[0]}
    run_passes(passed, passes_for(RECIPE, plan), stream_of(passed, ids, torch.ones_like(ids), batch_size=4))
    stored = {}
    for name in names:
        module = next(block.module for block in passed.blocks if block.name == plan[name].block)
        codes, scale = (get_tensor(module, f"{name}.weight_{part}").t() for part in ("codes", "scale"))
        stored[name] = QuantizedWeight(codes, scale, None, fmt)

    # Nothing is rounded in front of the first linear: what it reads there is what the float model reads.
    reads, _, _ = watched(reference_model(folder), ids, names[:1])
    seen = ChannelMeanAbs()
    seen.update(reads[names[0]].flatten(0, -2))
    weight = passed.load(f"{names[0]}.weight")
    wanted = absmean(weight, fmt, 2.5, seen.mean())
    torch.testing.assert_close(stored[names[0]].scale, wanted.scale, rtol=1e-5, atol=0)
    assert (stored[names[0]].codes == wanted.codes).float().mean() > 0.999
    assert (wanted.codes != absmean(weight, fmt, 2.5, torch.ones(weight.shape[1])).codes).any(), "data decides"

    # The same codes in transformers' model make the same errors as the file in ONNX Runtime.
    rounded = reference_model(folder)
    for name, quantized in stored.items():
        rounded.get_submodule(name).weight.data = quantized.dequantize()
    _, want, logits = watched(reference_model(folder), IDS, names)
    _, got, rounded_logits = watched(rounded, IDS, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "choose_text", lambda *_: Text(IDS, "token ids", False))
        report = qexport.validate(tmp_path / "out", folder)
    assert [found.name for found in report.layers.linears] == names
    for found in report.layers.linears:
        assert found.sqnr_db == pytest.approx(sqnr_db(want[found.name], got[found.name]), abs=0.01)
    p, q = logits[0, :-1].log_softmax(-1), rounded_logits[0, :-1].log_softmax(-1)
    assert report.logits.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_table_follows_from_what_the_output_projection_reads(tied, tmp_path):
    captured, found = capture_model(tied), {}
    recipe = Recipe(**TIED)
    round_table = AbsMeanSection.round_table

    def spy(section, table, fmt, seen):
        found["seen"], found["codes"] = seen.mean(), round_table(section, table, fmt, seen).codes
        return round_table(section, table, fmt, seen)

    with patch.object(AbsMeanSection, "round_table", spy):
        made = exports.export(captured, recipe, "cpu", tmp_path / "out")
    assert found["seen"].shape == (64,) and found["seen"].std() > 0
    for block in (made.blocks[0], made.blocks[-1]):
        assert torch.equal(get_tensor(block.module, "model.embed_tokens.weight_codes").t(), found["codes"])


def test_auto_chooses_schemes_that_it_goes_with(tied, tmp_path):
    text = "".join(map(chr, range(40, 120))) * 3
    found = qexport.export_auto(
        tied, Recipe(**TIED), out_dir=tmp_path / "auto", max_bytes=100_000, text=text, windows=2, window=64
    )
    size = sum(file.stat().st_size for file in (tmp_path / "auto").glob("model.onnx*"))
    assert size <= 100_000 and 0 < found.logits.kl_mean < 1
    assert len(set(found.schemes.values())) > 1 and not any("asym" in scheme for scheme in found.schemes.values())
    assert Recipe.load(tmp_path / "auto" / "recipe.yaml").weights == AbsMeanSection()
