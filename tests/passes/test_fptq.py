"""FPTQ chooses a format by the range of every activation, equalizes where that helps, and gives its reasons."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.pass_runs import plan_of, run_passes, stream_of
from helpers.random_decoders import FAMILIES
from helpers.runners import captured_runner, load_weights, padded, prompt_feeds, tokens
from qexport.calibrate.block_activations import Stream, collect
from qexport.capture.module import capture_module
from qexport.errors import PassError
from qexport.graph.edit import get_tensor, is_call
from qexport.graph.sites import fold_sites
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.base import Context, Pipeline
from qexport.passes.equalization.fptq import FPTQ, Decision, decide
from qexport.passes.weights.rtn import RoundToNearest
from qexport.plan.linear_plan import make_plan
from qexport.quant.formats import ActivationFormat, Scheme

ops = torch.ops.qexport
IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")
STATIC, DYNAMIC = ActivationFormat("static"), ActivationFormat("dynamic")


# --- the decision


def test_the_bounds_of_the_paper():
    found = [decide(r, 15, 150).what for r in (0, 14.9, 15, 15.1, 149.9, 150, 1e4)]
    static, equalized, dynamic = "static per-tensor", "equalized, static per-tensor", "dynamic per-token"
    assert found == [static, static, static, equalized, equalized, dynamic, dynamic]
    assert decide(20, 15, 150, "no place").what == dynamic


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.sampled_from(["", "no place"]))
def test_a_decision_follows_from_the_bounds_alone(reach, a, b, no_place):
    low, high = sorted((a, b))
    found = decide(reach, low, high, no_place)
    assert (found.kind == "static") == (reach <= low or (reach < high and not no_place))
    assert found.equalize == (low < reach < high and not no_place)
    assert ("no place" in found.why) == (low < reach < high and bool(no_place))


def test_the_sentence_names_range_bound_and_decision():
    assert decide(12.34, 15, 150).sentence(12.34) == "range 12.34 <= 15: static per-tensor"
    assert decide(40, 15, 150).sentence(40) == "range 40 > 15 and < 150: equalized, static per-tensor"
    assert decide(1062, 15, 150).sentence(1062) == "range 1062 >= 150: dynamic per-token"
    assert decide(40, 15, 150, "it is read twice").sentence(40) == (
        "range 40 > 15 and < 150, it is read twice: dynamic per-token"
    )


# --- a block whose ranges are known


class Branches(nn.Module):
    """On inputs of +1 and -1, as many of each in a row, norms put out their gains: 10, 40 and 200 at most."""

    def __init__(self):
        super().__init__()
        for name in ("below", "between", "above", "stuck", "kept"):
            self.add_module(name, nn.Linear(8, 4))
        self.norm_a, self.norm_b, self.norm_c = nn.RMSNorm(8), nn.LayerNorm(8), nn.RMSNorm(8)

    def forward(self, x):
        a, b, c = self.norm_a(x), self.norm_b(x), self.norm_c(x)
        return self.below(a) + self.between(b) + self.above(c) + self.stuck(x.abs() * 60) + self.kept(x.abs() * 70)


def signs(row):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(row))
    return torch.tensor([1.0, -1.0] * 4)[order]


SAMPLE = torch.stack([signs(row) for row in range(6)]).view(2, 3, 8)


@pytest.fixture
def branches():
    """(block, plan, collect): `kept` stays in float, the others are w8a8_dyn."""
    module = Branches()
    with torch.no_grad():
        for norm, largest in ((module.norm_a, 10), (module.norm_b, 40), (module.norm_c, 200)):
            norm.weight.copy_(torch.linspace(0.1, 1, 8) * largest)
        module.norm_b.bias.fill_(0.5)
    captured = load_weights(capture_module(module, (SAMPLE,)))
    (block,) = captured.blocks
    plans = make_plan([(block.name, block.module.graph)], lambda n: None if n == "kept" else Scheme.parse("w8a8_dyn"))
    stream = Stream([{block.inputs[0]: SAMPLE}], [None], {})
    return block.module, {p.name: p for p in plans}, lambda m, wanted: collect(block, stream, m, wanted)


def by_linear(notes):
    return {note.site: note for note in notes}


def test_three_ranges_three_decisions(branches):
    module, plan, seen = branches
    step, before = FPTQ(plan), module(SAMPLE)
    gains = [get_tensor(module, f"norm_{i}.weight") for i in "abc"]
    context = Context(seen(module, step.statistics(module)))
    result = step.call(module, context)

    notes, values = by_linear(result.changed), {s.consumers[0].name: s.value for s in fold_sites(module.graph)}
    assert {name: context.handover.formats.get(value) for name, value in values.items()} == {
        "below": STATIC, "between": STATIC, "above": DYNAMIC, "stuck": DYNAMIC, "kept": None,
    }  # fmt: skip
    assert {name: note.data["range"] for name, note in notes.items()} == pytest.approx(
        {"below": 10, "between": 40.5, "above": 200, "stuck": 60}, rel=1e-4
    )
    assert notes["below"].what == "range 10 <= 15: static per-tensor"
    assert notes["between"].what == "range 40.5 > 15 and < 150: equalized, static per-tensor, folded into the norm"
    assert notes["above"].what == "range 200 >= 150: dynamic per-token"
    assert notes["stuck"].what.startswith("range 60 > 15 and < 150, no place for the factor: ")
    assert notes["stuck"].what.endswith(": dynamic per-token")
    assert notes["stuck"].data["decision"] == "dynamic per-token"
    assert [(note.site, note.what) for note in result.skipped] == [("kept", "these linears stay in float")]

    now = [get_tensor(module, f"norm_{i}.weight") for i in "abc"]
    assert torch.equal(now[0], gains[0]) and torch.equal(now[2], gains[2]), "only the range in between is equalized"
    reached = gains[1] + 0.5
    assert torch.allclose(now[1], gains[1] * torch.log2(2 + reached) / reached, rtol=1e-4)
    assert torch.allclose(module(SAMPLE)[0], before[0], rtol=1e-4, atol=1e-3)


def test_the_graph_follows_the_decisions(branches):
    module, plan, seen = branches
    Pipeline([FPTQ(plan), RoundToNearest(plan), QuantizeActivations(plan)]).run(module, seen, (SAMPLE,))
    static = {n.target: get_tensor(module, n.target) for n in module.graph.nodes if "input_scale" in str(n.target)}
    assert {n: t.item() * 127 for n, t in static.items()} == pytest.approx(
        {"below.input_scale": 10, "between.input_scale": torch.log2(torch.tensor(42.5)).item()}, rel=1e-3
    )
    assert sum(is_call(n, ops.token_scale.default) for n in module.graph.nodes) == 2
    assert sum(is_call(n, ops.quantize_linear.default) for n in module.graph.nodes) == 4


def test_bounds_are_options(branches):
    module, plan, seen = branches
    step = FPTQ(plan, static_up_to=45, dynamic_from=150)
    result = step.call(module, Context(seen(module, step.statistics(module))))
    assert {name: note.data["decision"] for name, note in by_linear(result.changed).items()} == {
        "below": "static per-tensor", "between": "static per-tensor",
        "above": "dynamic per-token", "stuck": "dynamic per-token",
    }  # fmt: skip
    for bounds in ((20, 10), (-1, 10), (float("nan"), 10)):
        with pytest.raises(PassError, match="static up to"):
            FPTQ(plan, static_up_to=bounds[0], dynamic_from=bounds[1]).requires(module)


def test_a_multiplication_takes_the_factor_where_it_may(branches):
    module, plan, seen = branches
    step, before = FPTQ(plan, explicit=True), module(SAMPLE)
    context = Context(seen(module, step.statistics(module)))
    notes = by_linear(step.call(module, context).changed)
    assert notes["stuck"].what == "range 60 > 15 and < 150: equalized, static per-tensor, folded into a multiplication"
    read = next(s.value for s in fold_sites(module.graph) if s.consumers[0].name == "stuck")
    assert context.handover.formats[read] == STATIC and is_call(read, torch.ops.aten.mul.Tensor)
    assert torch.allclose(module(SAMPLE)[0], before[0], rtol=1e-4, atol=1e-3)


def test_linears_that_want_different_bits_keep_their_own_formats(captured):
    model = load_weights(captured("llama"))
    graphs = [(block.name, block.module.graph) for block in model.blocks]
    plan = make_plan(graphs, lambda name: Scheme.parse("w4a4" if name.endswith("k_proj") else "w8a8_dyn"))
    results = run_passes(model, [FPTQ({p.name: p for p in plan})], stream_of(model, IDS, MASK))
    (skipped,) = results["model.layers.0"]["FPTQ"].skipped
    assert "k_proj" in skipped.site and "4 and 8 bits" in skipped.what


def test_bits_are_those_of_the_scheme(captured):
    model = load_weights(captured("llama"))
    block, stream = model.blocks[1], stream_of(model, IDS, MASK)
    stream.advance(model.blocks[0], 0)
    step = FPTQ(plan_of(model, "w4a4_g32_int"))
    context = Context(collect(block, stream, block.module, step.statistics(block.module)))
    step.call(block.module, context)
    assert {fmt.bits for fmt in context.handover.formats.values()} == {4}


@pytest.mark.parametrize("family", FAMILIES)
def test_equalizing_everything_leaves_the_logits_as_they_are(captured, family):
    model = load_weights(captured(family))
    run, feeds = captured_runner(model), prompt_feeds(model, IDS, MASK)
    want = run(feeds)["logits"][MASK.bool()]
    step = FPTQ(plan_of(model, "w8a8_dyn"), static_up_to=0.0, dynamic_from=1e9)
    results = run_passes(model, [step], stream_of(model, IDS, MASK))
    got = run(feeds)["logits"][MASK.bool()]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    for block in model.blocks[1:]:
        notes, sites = results[block.name]["FPTQ"].changed, fold_sites(block.module.graph)
        for note, site in zip(notes, sites, strict=True):
            stuck = site.kind == "explicit"
            assert note.data["decision"] == ("dynamic per-token" if stuck else "equalized, static per-tensor")
            assert ("no place for the factor" in note.what) == stuck


def test_inputs_that_stay_float_are_not_decided(captured):
    model = load_weights(captured("llama"))
    results = run_passes(model, [FPTQ(plan_of(model, "w4a16_g32"))], stream_of(model, IDS, MASK))
    result = results["model.layers.0"]["FPTQ"]
    assert not result.changed and {n.what for n in result.skipped} == {"no input of these linears is quantized"}


def test_a_decision_is_a_plain_value():
    assert decide(1, 2, 3) == Decision("static", False, "<= 2")


@pytest.mark.parametrize("scheme, kept", [("w4a8_g32_int", True), ("w4a8_g32", False)])
def test_codes_that_are_expanded_when_loaded_are_those_without_the_policy(captured, scheme, kept):
    """Four bits would lose by the factor; the int8 weights that are made of them carry it instead."""

    def codes(*before):
        model = load_weights(captured("llama"))
        plan = plan_of(model, scheme)
        run_passes(model, [*(step(plan) for step in before), RoundToNearest(plan)], stream_of(model, IDS, MASK))
        return {
            name: tensor
            for block in model.blocks
            for name, tensor in block.module.named_buffers()
            if name.endswith(("weight_codes", "column_factor"))
        }

    plain = codes()
    equalized = codes(lambda plan: FPTQ(plan, static_up_to=0.0, dynamic_from=1e9))
    # Consumers of a norm are only that; the others' own rows were divided by factors, which rounding passes on.
    names = [name for name in plain if name.endswith(("k_proj.weight_codes", "gate_proj.weight_codes"))]
    different = [(plain[name] != equalized[name]).float().mean().item() for name in names]
    assert names and (max(different) < 1e-3) == kept
    factors = [name for name in equalized if name.endswith("column_factor")]
    assert bool(factors) == kept and not any(name.endswith("column_factor") for name in plain)
