import json
import math

import pytest
import torch

from qexport.errors import InputError
from qexport.validation.anomalies import fault_of_weight, grid_of, with_faults
from qexport.validation.formatting import summary_rows, worst_first
from qexport.validation.report import (  # fmt: skip
    HALF,
    Activation,
    Greedy,
    InputRange,
    LayerComparison,
    Logits,
    Placement,
    Reference,
    Report,
    Unfused,
    ValueComparison,
)
from qexport.validation.report_store import branch_gains, exported_activations, load, save
from qexport.validation.verdict import with_verdict


def row(name, sqnr, error=1.0, **more):
    return ValueComparison(name=name, sqnr_db=sqnr, own_sqnr_db=sqnr, cosine=1.0, max_abs_error=error, **more)


def a_report(**changes):
    fields = dict(
        reference="m", text="t",
        layers=LayerComparison(tokens=4, linears=(row("a", 20.0), row("b", 10.0)), blocks=(), sessions=1),
        placement=Placement(provider="P", nodes_per_provider={"P": 3}, op_counts={"X": 3}, kernels={"K": 2}),
    )  # fmt: skip
    return Report(**fields | changes)


def test_worst_first_puts_broken_values_before_noisy_ones_and_equal_ones_last():
    rows = [row("equal", math.inf, 0.0), row("good", 40.0), row("nan", math.nan, math.nan), row("bad", 3.0)]
    rows.append(row("silent", -math.inf))
    assert [r.name for r in worst_first(rows)] == ["nan", "silent", "bad", "good", "equal"]


def test_worst_first_goes_by_the_error_of_the_own_block():
    inherited = row("late", 2.0).model_copy(update={"own_sqnr_db": 30.0})
    assert [r.name for r in worst_first([inherited, row("culprit", 9.0)])] == ["culprit", "late"]


def test_infinities_are_null_in_json():
    text = json.dumps(row("x", math.inf, math.nan).model_dump(mode="json"), allow_nan=False)
    assert json.loads(text)["sqnr_db"] is None and ValueComparison.model_validate_json(text) == row("x", None, None)


def test_verdict_names_the_lowest_and_what_is_wrong():
    broken = Unfused(name="a", expected="K", found="MatMul")
    place = Placement(
        provider="P",
        nodes_per_provider={"P": 3, "Q": 2},
        op_counts={},
        kernels={"K": 1, "MatMul": 1},
        unfused=(broken,),
    )
    report = with_verdict(a_report(placement=place))
    assert report.problems == ("1 linear is not fused: a (MatMul instead of K)", "2 nodes run on Q instead of P")
    assert report.verdict[:2] == report.problems
    assert report.verdict[2] == "b has the lowest SQNR, 10.0 dB; the median linear has 10.0 dB"
    assert with_verdict(a_report()).verdict[0] == "all 2 quantized linears run as K"


def scores(perplexity):
    return Logits(
        windows=1, window=9, tokens=8, kl_mean=0.1, kl_median=0.1, kl_p99=0.1, top1_agreement=0.5,
        float_perplexity=10.0, perplexity=perplexity,
    )  # fmt: skip


@pytest.mark.parametrize(
    "perplexity, kl, sentence",
    [
        (10.09, 0.004, "perplexity rises by 0.9%: Class-1 of ZeroQuant-V2 (up to 1 %: hardly any degradation)"),
        (10.4, 0.02, "perplexity rises by 4.0%: Class-2 of ZeroQuant-V2 (1 to 5 %)"),
        (10.7, 0.02, "perplexity rises by 7.0%: Class-3 of ZeroQuant-V2 (above 5 %)"),
        (9.0, 0.02, "perplexity falls by 10.0%, which is chance and no gain: by KL, which is worth a rise of 2.0%, it "
         "is Class-2 of ZeroQuant-V2 (1 to 5 %)"),
    ],
)  # fmt: skip
def test_a_change_of_perplexity_has_the_class_of_its_share(perplexity, kl, sentence):
    for times in (1, 100):  # whatever the text's perplexity is
        found = scores(times * perplexity).model_copy(update={"float_perplexity": times * 10.0, "kl_mean": kl})
        assert with_verdict(a_report(logits=found)).verdict[-1] == sentence


def beside(half_kl, single_kl, kl=0.1, **broken):
    """A report with both references, their mean KL as given."""
    forms = ((HALF, half_kl), ("float32 in ONNX Runtime", single_kl))
    references = tuple(
        Reference(name=name, logits=scores(10.0).model_copy(update={"kl_mean": value, **broken}))
        for name, value in forms
    )
    mine = scores(10.0).model_copy(update={"kl_mean": kl, "top5_agreement": 0.5})
    return with_verdict(a_report(logits=mine, references=references))


def test_the_verdict_measures_kl_in_that_of_float16():
    report = beside(2e-5, 1e-11)
    assert report.verdict[-1].startswith("KL is 5,000 times that of float16 in PyTorch (2e-05), the smallest")
    assert beside(0.08, 1e-11).verdict[-1].startswith("KL is 1.2 times that of float16")
    assert beside(0.2, 1e-11).verdict[-1].endswith("a difference that means nothing")
    assert "any difference means something" in beside(0.0, 1e-11).verdict[-1]
    assert beside(None, 1e-11, nonfinite_tokens=3).verdict[-1] == (
        "the model itself fails in float16: 3 of 8 tokens give NaN or Inf"
    )
    rows = {name: value for name, value, _ in summary_rows(report)}
    assert rows[HALF] == "KL 2e-05, top-1 50.0%" and rows["top-5 agreement"] == "50.0%"


@pytest.mark.parametrize("half, single, wrong", [
    (2e-5, 1e-11, False), (2e-5, 1e-8, True), (1e-9, 9e-11, False), (2e-5, None, True), (None, 1e-7, True),
    (None, 1e-9, False),
])  # fmt: skip
def test_a_float_file_that_is_not_the_float_model_is_a_problem(half, single, wrong):
    problems = beside(half, single).problems
    assert len(problems) == wrong and all("float32 in ONNX Runtime" in problem for problem in problems)


@pytest.mark.parametrize("agreed, sentence", [
    ((8, 8), "greedily both models write the same 8 tokens after 2 prompts of 64 tokens"),
    ((0, 8), "greedily both models write the same 0 to 8 of 8 tokens after 2 prompts of 64 tokens before they part"),
    ((3,), "greedily both models write the same 3 of 8 tokens after 1 prompt of 64 tokens before they part"),
])  # fmt: skip
def test_greedy_texts_in_words(agreed, sentence):
    report = with_verdict(a_report(greedy=Greedy(prompts=len(agreed), prompt_tokens=64, new_tokens=8, agreed=agreed)))
    assert report.verdict[-1] == sentence
    (row,) = [row for row in summary_rows(report) if row[0] == "greedy tokens alike"]
    assert row[1] == f"{', '.join(map(str, agreed))} of 8"


def test_what_was_left_out_is_in_the_verdict():
    assert with_verdict(a_report(left_out=("one thing was left out",))).verdict[-1] == "one thing was left out"


def test_activations_are_what_the_export_says(tmp_path):
    assert exported_activations(tmp_path) == ()
    measured = {"bits": 8, "kernel": 0.25, "kernel_without_zeros": 0.125, "linears": ["q", "k"]}
    changed = {"QuantizeActivations": [["norm", "static per-tensor", measured], ["x", "dynamic per-token", {
        "bits": 8, "linears": ["o"]}]], "GPTQ": [["q", "w8a8", {}]]}  # fmt: skip
    blocks = [{"name": "layers.0", "changed": changed, "skipped": {}}]
    (tmp_path / "report.json").write_text(json.dumps({"export": {"blocks": blocks}}))
    first, second = exported_activations(tmp_path)
    assert first == Activation(block="layers.0", what="static per-tensor", **measured)
    assert second.kernel is None and second.linears == ("o",)
    facts = with_verdict(a_report(activations=(first, second))).verdict
    assert "quantized activations: 1 static per-tensor, 1 dynamic per-token" in facts
    assert any("makes 25.0% of the quantized activations zero, most (25.0%, 12.5%" in fact for fact in facts)


def test_saving_keeps_other_keys_and_replaces_an_earlier_validation(tmp_path):
    (tmp_path / "report.json").write_text('{"export": {"seconds": 1}}')
    save(a_report(), tmp_path)
    save(a_report(text="other"), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["export"] == {"seconds": 1}
    assert load(tmp_path) == a_report(text="other")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_without_validation_has_none(tmp_path):
    assert load(tmp_path) is None


def test_a_damaged_report_is_not_overwritten(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="unreadable"):
        save(a_report(), tmp_path)


def test_a_fault_comes_first_whatever_the_errors_are():
    rows = [row("noisy", 3.0), row("odd", 30.0, fault="one group off in scale"), row("nan", math.nan, math.nan)]
    assert [r.name for r in worst_first(rows)] == ["nan", "odd", "noisy"]
    report = with_verdict(a_report(layers=LayerComparison(tokens=4, linears=tuple(rows[:2]), blocks=(), sessions=1)))
    assert report.problems == ("odd: one group off in scale",)
    assert any(sentence.startswith("noisy has the lowest SQNR") for sentence in report.verdict)


def test_far_below_others_of_its_kind_is_a_fault():
    def rows(last, spread=0.5):
        values = [30 + spread * (i - 2) for i in range(5)] + [last]
        return [row(f"layers.{i}.o", value) for i, value in enumerate(values)] + [row("layers.0.q", 10.0)]

    found = with_faults(rows(15.0), (), {}, {})
    assert [r.name for r in found if r.fault] == ["layers.5.o"] and "15.0 dB below" in found[5].fault
    assert not any(r.fault for r in with_faults(rows(19.5), (), {}, {})), "within what good exports show"
    assert not any(r.fault for r in with_faults(rows(10.0, spread=4.0), (), {}, {})), "where all differ, one may"
    said = with_faults(rows(30.0), (), {"layers.1.o": "X instead of Y"}, {})
    assert [(r.name, r.fault) for r in said if r.fault] == [("layers.1.o", "X instead of Y")]


def test_the_verdict_says_where_time_goes_and_what_is_cut_off():
    linears = tuple(row(name, 20.0, time_share=0.25, step_time_share=0.3) for name in "ab")
    ranges = [InputRange(
        block="", linears=(name,), float_absmax=1, absmax=1, float_spread=1, spread=1, clipped=share,
    ) for name, share in (("a", 0.0002), ("b", 0.25))]  # fmt: skip
    layers = LayerComparison(
        tokens=4, linears=linears, blocks=(), sessions=1, attentions=(row("att", 7.0),), ranges=tuple(ranges),
        time_by_op={"MatMulNBits": 0.5, "GroupQueryAttention": 0.4, "Mul": 0.1},
        step_time_by_op={"MatMulNBits": 0.6, "Mul": 0.4},
    )  # fmt: skip
    facts = with_verdict(a_report(layers=layers, logits=scores(10.0))).verdict
    times = "50% of the time of a prompt (40% are attention) and 60% of the time of a step (0% are attention)"
    assert f"quantized linears take {times}" in facts
    assert "25.00% of what b read is beyond its static scale" in facts
    assert any(fact.startswith("what comes out of att has the lowest SQNR of the attentions, 7.0 dB") for fact in facts)


def test_gains_of_branches_are_what_the_export_says(tmp_path):
    assert branch_gains(tmp_path) == {}
    notes = [["a", "a branch of rank 4", {"error removed": 0.9}], ["b", "a branch of rank 4", {"error removed": 1.0}]]
    blocks = [{"name": "layers.0", "changed": {"LoRC": notes}, "skipped": {}}]
    (tmp_path / "report.json").write_text(json.dumps({"export": {"blocks": blocks}}))
    assert branch_gains(tmp_path) == {"a": pytest.approx(10), "b": math.inf}


def test_what_reads_a_linear_that_is_wrong_is_not_accused_of_its_factors():
    """Factors of smoothing are told by what the linear in front made."""
    rows = [row("up", 30.0, fault="2 channels off"), row("down", 20.0, fault="input channels off")]
    assert [r.fault for r in with_faults(rows, (), {}, {"down": "up"})] == ["2 channels off", ""]
    rows[0] = row("up", 30.0)
    assert [r.fault for r in with_faults(rows, (), {}, {"down": "up"})] == [
        "", "input channels off; a factor on channels of up in front of it would show here too",
    ]  # fmt: skip


def test_a_factor_on_one_input_channel_is_told_from_rounding():
    random = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (256, 192), generator=random) * 2.0 - 1
    weight = torch.randn(96, 192, generator=random)
    step = weight.abs().amax(1, keepdim=True) / 127
    weight[:, 5] *= 0.01  # most of it rounds to nothing, which is no fault
    rounded = (weight / step).round() * step
    assert fault_of_weight(x, weight, x @ (rounded - weight).t(), grid_of("w8a8_static")) == ""
    rounded[:, 17] *= 4
    said = fault_of_weight(x, weight, x @ (rounded - weight).t(), grid_of("w8a8_static"))
    assert said == "1 of 192 input channels of its weight are off, channel 17 by a factor of 4"


@pytest.mark.parametrize(("features", "steps", "told"), [(128, 0.9, True), (64, 0.9, False), (64, 2.0, True)])
def test_an_offset_of_a_narrow_weight_is_a_fault_from_more_than_a_code_on(features, steps, told):
    torch.manual_seed(0)
    x, weight = torch.randn(256, features), torch.randn(32, features)
    step = (weight[7].amax() - weight[7].amin()) / 15
    error = (torch.rand(32, features) - 0.5) * (weight.amax(1) - weight.amin(1))[:, None] / 15
    error[7] += steps * step
    said = fault_of_weight(x, weight, x @ error.t(), grid_of("w4a16_g128_asym"))
    assert ("off in zero point, channel 7" in said) is told and bool(said) is told



def test_an_output_that_is_mostly_error_is_poor_and_no_fault_of_the_file():
    good, bad = (
        ValueComparison(name="logits", sqnr_db=15.8, max_abs_error=1.0),
        ValueComparison(name="boxes", sqnr_db=4.3, max_abs_error=1.0),
    )
    report = with_verdict(a_report(outputs=(good, bad)))
    assert (report.quality.grade, report.quality.tone, report.problems) == ("poor", "bad", ())
    assert report.verdict[0] == "quality is poor: output boxes 4.3 dB (fair goes to 10.0 dB)"
    assert with_verdict(a_report(outputs=(good,))).quality.grade == "fair"


def test_evidence_lowers_the_bar_where_a_kind_differs_much_between_layers():
    """One static scale divided by 8 took a linear 17 dB down, less than 8 of the median deviations of its kind."""
    sqnr = [22.0, 18.0, 26.0, 20.0, 24.0, 17.0, 27.0, 22.5, 5.0]
    rows = [row(f"layers.{i}.down_proj", value, scheme="w8a8_static") for i, value in enumerate(sqnr)]

    def ranges(clipped=1e-4, reach=1.1):
        return [
            InputRange(
                block="", linears=(r.name,), float_absmax=1.0, absmax=1.0, float_spread=1.0, spread=1.0,
                clipped=clipped if r is rows[-1] else 7e-5, reach=reach if r is rows[-1] else 1.1,
            )
            for r in rows
        ]  # fmt: skip

    def faults(found, given=None):
        return {r.name: r.fault for r in with_faults(given or rows, found, {}, {}) if r.fault}

    name = rows[-1].name
    assert not faults(ranges()), "far below the others, and nothing else speaks against it"
    assert faults(ranges(clipped=0.03)) == {
        name: "its SQNR of 5.0 dB is 17.2 dB below the median of the 8 others like it; 3.0% of its input is beyond its "
        "static scale"
    }
    assert "its static scale reaches 8.8 times as far as its input" in faults(ranges(reach=8.8))[name]
    costly = [r.model_copy(update={"kl_cost": 0.05 if r.name == name else 0.001}) for r in rows]
    assert "it costs 50 times the KL of the others like it" in faults(ranges(), costly)[name]
    # Of a kind with a few huge values, next to nothing is cut off, and what is left of it is mostly error.
    assert "its static scale reaches 0.12 times as far as its input" in faults(ranges(reach=0.12))[name]
    lost = [*rows[:-1], row(name, 1.2, scheme="w8a8_static")]
    assert faults(ranges(), lost)[name].startswith("its SQNR of 1.2 dB is 21.1 dB below the median of the 8")
    near = [*rows[:-1], row(name, 18.0, scheme="w8a8_static")]
    clipped = [r.model_copy(update={"clipped": 0.03}) if r.linears == (name,) else r for r in ranges()]
    assert not faults(clipped, near), "it is clipped, and no worse than others"
    most = [r.model_copy(update={"clipped": 0.06}) for r in clipped]
    assert faults(most, near)[name] == "6.0% of its input is beyond its static scale"
