"""Inputs of quantized linears are quantized once for each value, with ranges that padding has no part in."""

import pytest
import torch

from helpers.pass_runs import plan_of, run_passes, stream_of
from helpers.random_decoders import FAMILIES
from helpers.runners import load_weights, padded, tokens
from qexport.calibrate.block_activations import collect
from qexport.graph.edit import is_call
from qexport.graph.sites import by_input, linears
from qexport.passes.activations.quantize import QuantizeActivations
from qexport.passes.weights.rtn import RoundToNearest
from qexport.quant.hessian import HessianStatistic
from qexport.quant.observers import AbsmaxObserver, ChannelAbsmax

ops = torch.ops.qexport
IDS, MASK = tokens(3, 9), padded([9, 4, 6], "left")


class Rows:
    def __init__(self):
        self.seen = []

    def update(self, x):
        self.seen.append(x)


def quantized(captured, scheme, **options):
    plan = plan_of(captured, scheme)
    results = run_passes(
        captured, [RoundToNearest(plan), QuantizeActivations(plan, **options)], stream_of(captured, IDS, MASK)
    )
    return [results[block.name]["QuantizeActivations"] for block in captured.blocks]


def calls(block, target):
    return [node for node in block.module.graph.nodes if is_call(node, target)]


@pytest.mark.by_default("llama-*", "gpt_neox-*", "gemma3-*")
@pytest.mark.parametrize("scheme, kind", [("w8a8_static", "static per-tensor"), ("w4a8_g32", "dynamic per-token")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_is_quantized_once_for_all_linears_that_read_it(captured, family, scheme, kind):
    model = load_weights(captured(family))
    values = [len(by_input(linears(block.module.graph))) for block in model.blocks]
    results = quantized(model, scheme)
    for block, result, number in zip(model.blocks, results, values, strict=True):
        assert len(calls(block, ops.quantize_linear.default)) == len(result.changed) == number
        assert len(calls(block, ops.token_scale.default)) == (number if "dynamic" in kind else 0)
        assert all(note.what == kind for note in result.changed)


def test_schemes_without_activation_format_are_left_alone(captured):
    model = load_weights(captured("llama"))
    quantized(model, "w4a16_g32")
    assert not any(calls(block, ops.quantize_linear.default) for block in model.blocks)


def test_a_static_scale_is_the_largest_real_activation(captured):
    model, reference = load_weights(captured("llama")), load_weights(captured("llama"))
    (note, *_) = quantized(model, "w8a8_static")[1].changed
    stream = stream_of(reference, IDS, MASK)
    stream.advance(reference.blocks[0], 0)  # the embedding: nothing in it is quantized
    block = reference.blocks[1]
    value = next(iter(by_input(linears(block.module.graph))))
    assert note.site == value.name
    rows = []
    collect(
        block, stream, block.module, {value: lambda: type("Rows", (), {"update": lambda self, x: rows.append(x)})()}
    )
    absmax = torch.cat(rows).abs().max().item()
    scale = model.blocks[1].module.get_buffer("model.layers.0.self_attn.q_proj.input_scale")
    assert note.data["absmax"] == pytest.approx(absmax, rel=1e-6)
    assert scale.item() == pytest.approx(absmax / 127, rel=1e-6)


@pytest.mark.by_default("mse")
@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_other_observers_clip(captured, observer):
    def scales(**options):
        model = load_weights(captured("llama"))
        quantized(model, "w8a8_static", **options)
        named = [dict(block.module.named_buffers()) for block in model.blocks]
        return torch.stack([t for tensors in named for n, t in sorted(tensors.items()) if n.endswith("input_scale")])

    clipped, whole = scales(observer=observer, percentile=99.0), scales()
    # The first block sees float inputs in both cases; behind it, clipping has changed what is seen.
    assert (clipped[:4] <= whole[:4] * 1.0001).all()
    if observer == "percentile":  # so few values have no tail that is worth clipping for the squared error
        assert (clipped[:4] < 0.99 * whole[:4]).all()


@pytest.mark.parametrize("factory", [AbsmaxObserver, ChannelAbsmax, HessianStatistic])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_padding_leaves_statistics_as_they_are(captured, family, factory):
    """The same rows alone and beside shorter ones give the same statistics, whatever stands in the padding."""
    model = load_weights(captured(family))
    filled = torch.where(MASK.bool(), IDS, 77)
    alone = [(IDS[i : i + 1, -n:], torch.ones(1, n, dtype=torch.int64)) for i, n in enumerate(MASK.sum(1).tolist())]
    together, apart = (
        [statistics(model, *batch, factory) for batch in batches] for batches in ([(filled, MASK)], alone)
    )
    (together,) = together
    for name, got in together.items():
        parts = [part[name] for part in apart]
        if factory is HessianStatistic:  # a mean over tokens
            counts = MASK.sum(1).tolist()
            want = sum(n * part.value() for n, part in zip(counts, parts, strict=True)) / sum(counts)
            got = got.value()
        else:
            got = torch.as_tensor(got.absmax())
            want = torch.stack([torch.as_tensor(part.absmax()) for part in parts]).amax(0)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def statistics(model, ids, mask, factory):
    """Statistics of the input of every linear, by name of block and value."""
    stream, found = stream_of(model, ids, mask, batch_size=4), {}
    for index, block in enumerate(model.blocks):
        wanted = dict.fromkeys(by_input(linears(block.module.graph)), factory)
        for node, statistic in collect(block, stream, block.module, wanted).items():
            found[block.name, node.name] = statistic
        if index < len(model.blocks) - 1:
            stream.advance(block, index)
    return found
