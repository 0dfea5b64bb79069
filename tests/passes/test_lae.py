"""Logarithmic equalization leaves the float model as it is and compresses the channels of its activations."""

import pytest
import torch

from helpers.pass_runs import plan_of, run_passes, stream_of
from helpers.random_decoders import FAMILIES
from helpers.runners import load_weights, padded, run_twice, tokens
from qexport.calibrate.block_activations import collect
from qexport.graph.sites import fold_sites
from qexport.passes.base import Context
from qexport.passes.equalization.lae import LogEqualize
from qexport.quant.observers import ChannelAbsmax

IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")


@pytest.mark.each_value_once
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_were(captured, family, explicit):
    model = load_weights(captured(family))
    want = run_twice(model, IDS, MASK)
    step = LogEqualize(plan_of(model, "w8a8_static"), explicit=explicit)
    results = run_passes(model, [step], stream_of(model, IDS, MASK))
    got = run_twice(model, IDS, MASK)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    for block in model.blocks[1:]:
        result, sites = results[block.name]["LogEqualize"], fold_sites(block.module.graph)
        skipped = 0 if explicit else sum(site.kind == "explicit" for site in sites)
        assert len(result.skipped) == skipped and len(result.changed) == len(sites) - skipped > 0


def test_every_channel_ends_at_the_logarithm_of_its_range(captured):
    model = load_weights(captured("llama"))
    stream = stream_of(model, IDS, MASK)
    stream.advance(model.blocks[0], 0)
    block, step = model.blocks[1], LogEqualize(plan_of(model, "w8a8_static"))

    def absmax():
        wanted = {s.value: ChannelAbsmax for s in fold_sites(block.module.graph)}
        return {value: seen.absmax().double() for value, seen in collect(block, stream, block.module, wanted).items()}

    before = absmax()
    step.call(block.module, Context(collect(block, stream, block.module, step.statistics(block.module))))
    after = absmax()
    for site in fold_sites(block.module.graph):
        want = before[site.value]
        if site.repeat is not None:  # query heads that share a channel share the factor of the largest
            grouped = want.view(*site.repeat[:2], -1)
            largest = grouped.amax(1, keepdim=True)
            want = (grouped / (largest / torch.log2(2 + largest))).reshape(-1)
        else:
            want = torch.log2(2 + want)
        assert torch.allclose(after[site.value], want, rtol=1e-4)
