"""SmoothQuant leaves the float model as it is, evens its activations out, and says what it did where."""

from dataclasses import dataclass

import pytest
import torch

from helpers.breadth import quick
from helpers.pass_runs import plan_of, run_passes, stream_of
from helpers.random_decoders import BREADTH, FAMILIES
from helpers.runners import load_weights, padded, run_twice, tokens
from qexport.calibrate.block_activations import collect
from qexport.graph.edit import get_tensor
from qexport.graph.sites import fold_sites
from qexport.passes.base import Context
from qexport.passes.equalization.equalize import on_consumers, on_producer
from qexport.passes.equalization.scale_search import ALPHAS, best
from qexport.passes.equalization.smoothquant import SmoothQuant
from qexport.quant.observers import ChannelAbsmax
from qexport.quant.smoothing import smoothquant_factors

IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")


@pytest.mark.each_value_once
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("family", quick(FAMILIES, among=(*FAMILIES, *BREADTH)))
def test_logits_stay_what_they_were(captured, family, explicit):
    model = load_weights(captured(family))
    want = run_twice(model, IDS, MASK)
    step = SmoothQuant(plan_of(model, "w8a8_dyn"), alpha=0.5, explicit=explicit)
    results = run_passes(model, [step], stream_of(model, IDS, MASK))
    got = run_twice(model, IDS, MASK)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    for block in model.blocks[1:]:
        result, sites = results[block.name]["SmoothQuant"], fold_sites(block.module.graph)
        plans = [[step.plan[c.name] for c in site.consumers] for site in sites]
        # A weight that others read too takes no factor.
        kept = sum(all(p.scheme is None for p in read) or any("shared" in p.reason for p in read) for read in plans)
        skipped = kept if explicit else sum(site.kind == "explicit" for site in sites)
        assert len(result.skipped) == skipped and len(result.changed) == len(sites) - skipped
        reasons = ("no place for the factor: ", "these linears stay in float")
        assert all(any(reason in note.what for reason in reasons) for note in result.skipped)


@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w8a8_static", "w4a8_g32"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3"])
def test_a_search_is_as_good_as_one_half_and_leaves_the_logits(captured, family, scheme):
    model = load_weights(captured(family))
    want = run_twice(model, IDS, MASK)
    plan = plan_of(model, scheme)
    seen = {}

    @dataclass(frozen=True)
    class Watched(SmoothQuant):
        def factors(self, module, site, statistics):
            weights = [get_tensor(module, c.weight) for c in site.consumers]
            channels, rows = statistics.parts
            shared = [part for w in weights for part in rows_of_producer(site, w)]
            half = on_consumers(site, smoothquant_factors(on_producer(site, channels.absmax()), shared, 0.5))
            schemes = [plan[c.name].scheme for c in site.consumers]
            fixed = best([0.5], lambda alpha: half, rows.rows(), weights, schemes, absmax=channels.absmax())
            factors, data = super().factors(module, site, statistics)
            found, half = (d["error relative to no factor"] for d in (data, fixed.data()))
            seen[site.value] = found, half, factors
            return factors, data

    results = run_passes(model, [Watched(plan, alpha=None)], stream_of(model, IDS, MASK))
    assert seen
    for found, half, factors in seen.values():
        assert min(found, 1.0) <= half
        assert (factors is None) == (found >= 1)
    got = run_twice(model, IDS, MASK)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    notes = [note for block in model.blocks[1:] for note in results[block.name]["Watched"].changed]
    assert len(notes) == sum(factors is not None for *_, factors in seen.values()) > 0
    assert all(note.data["alpha"] in ALPHAS for note in notes)


def rows_of_producer(site, weight):
    """The rows of a weight for each query head of a group, over the channels of the kv heads."""
    if site.repeat is None:
        return [weight]
    kv_heads, queries, head_dim = site.repeat
    columns = torch.arange(weight.shape[1]).view(kv_heads, queries, head_dim)
    return [weight[:, columns[:, query].flatten()] for query in range(queries)]


def test_with_alpha_one_all_channels_of_an_input_get_the_same_range(captured):
    model = load_weights(captured("llama"))
    stream = stream_of(model, IDS, MASK)
    stream.advance(model.blocks[0], 0)
    block, step = model.blocks[1], SmoothQuant(plan_of(model, "w8a8_dyn"), alpha=1.0)
    step.call(block.module, Context(collect(block, stream, block.module, step.statistics(block.module))))
    for site in (s for s in fold_sites(block.module.graph) if s.repeat is None):
        absmax = collect(block, stream, block.module, {site.value: ChannelAbsmax})[site.value].absmax()
        assert absmax.max() < 1.001 * absmax.min()


def test_factors_of_grouped_heads_are_shared_by_the_queries_of_a_group(captured):
    model = load_weights(captured("llama"))
    name = "model.layers.0.self_attn.o_proj.weight"
    before = dict(model.blocks[1].module.named_buffers())[name].clone()
    run_passes(model, [SmoothQuant(plan_of(model, "w8a8_dyn"))], stream_of(model, IDS, MASK))
    ratio = (dict(model.blocks[1].module.named_buffers())[name] / before)[0].view(2, 2, 16)
    assert torch.allclose(ratio[:, 0], ratio[:, 1], rtol=1e-5)
    assert ratio.max() > 1.2 * ratio.min()


def test_inputs_that_stay_float_are_left_alone(captured):
    model = load_weights(captured("llama"))
    results = run_passes(model, [SmoothQuant(plan_of(model, "w4a16_g32"))], stream_of(model, IDS, MASK))
    for name in (block.name for block in model.blocks[1:]):
        result = results[name]["SmoothQuant"]
        assert not result.changed
        assert {note.what for note in result.skipped} == {"no input of these linears is quantized"}


def test_gains_of_one_plus_w_keep_their_digits_in_float16(captured):
    """Written as 1 + w, a gain of 0.001 would lose all but one digit in float16."""
    model = load_weights(captured("gemma3"))
    run_passes(model, [SmoothQuant(plan_of(model, "w8a8_dyn"), alpha=1.0)], stream_of(model, IDS, MASK))
    for block in model.blocks[1:]:
        for site in fold_sites(block.module.graph):
            if site.kind == "norm":
                assert site.producer.args[2].op == "get_attr"
