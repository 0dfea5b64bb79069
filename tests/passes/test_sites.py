"""Where a per-channel factor can go is found from the dataflow, for every family and for graphs that set traps."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.pass_runs import block_of
from helpers.random_decoders import FAMILIES
from helpers.runners import captured_runner, load_weights, padded, prompt_feeds, tokens
from qexport.errors import PassError
from qexport.graph.sites import by_input, fold_sites, linears
from qexport.passes.equalization.equalize import fold

GROUPED, ALONE = (2, 2, 16), (4, 1, 16)
LLAMA = [
    ("norm", "q_proj k_proj v_proj", None),
    ("rows", "o_proj", GROUPED),
    ("norm", "gate_proj up_proj", None),
    ("rows", "down_proj", None),
]
SITES = dict.fromkeys(FAMILIES, LLAMA) | {
    "opt": [
        ("norm", "q_proj k_proj v_proj", None),
        ("rows", "out_proj", ALONE),
        ("norm", "fc1", None),
        ("rows", "fc2", None),
    ],
    "gpt_neox": [
        ("norm", "query_key_value", None),
        ("explicit", "dense", None),
        ("norm", "dense_h_to_4h", None),
        ("explicit", "dense_4h_to_h", None),
    ],
    "phi3": [
        ("norm", "qkv_proj", None),
        ("explicit", "o_proj", None),
        ("norm", "gate_up_proj", None),
        ("explicit", "down_proj", None),
    ],
}
PRODUCERS = {"o_proj": "v_proj", "out_proj": "v_proj", "down_proj": "up_proj", "fc2": "fc1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_every_layer(captured, family):
    for block in captured(family).blocks[1:-1]:
        sites = fold_sites(block.module.graph)
        found = [(s.kind, " ".join(c.name.rpartition(".")[2] for c in s.consumers), s.repeat) for s in sites]
        assert found == SITES[family]
        rows = {linear.node: linear.name.rpartition(".")[2] for linear in linears(block.module.graph)}
        for site, (kind, consumers, _) in zip(sites, found, strict=True):
            if kind == "rows":
                assert rows[site.producer] == PRODUCERS[consumers]
            elif kind == "norm":
                assert site.producer is site.value
            else:
                assert site.why and site.producer is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_norm_feeds_the_output_layer(captured, family):
    (site,) = fold_sites(captured(family).blocks[-1].module.graph)
    assert (site.kind, [c.name for c in site.consumers]) == ("norm", ["lm_head"])


def test_reasons_name_what_is_in_the_way(captured):
    def reasons(family):
        sites = fold_sites(captured(family).blocks[1].module.graph)
        return [s.why for s in sites if s.kind == "explicit"]

    attention, gelu = reasons("gpt_neox")
    assert attention == "the values of the attention do not come straight from a linear"
    assert gelu == "gelu comes from gelu.default, which a factor cannot pass"
    attention, product = reasons("phi3")
    assert attention == "the values of the attention do not come straight from a linear"
    assert product.endswith("comes straight from a linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_belong_to_values(captured, family):
    for block in captured(family).blocks[1:-1]:
        assert len(by_input(linears(block.module.graph))) == 4


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), spread=st.floats(0.1, 3))
def test_any_positive_factors_leave_the_model_as_it_is(captured, family, seed, spread):
    """Factors over several orders of magnitude at once at every site of every block."""
    model = load_weights(captured(family))
    feeds = prompt_feeds(model, tokens(2, 6), padded([6, 4], "left"))
    want = captured_runner(model)(feeds)["logits"]
    random = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for site in fold_sites(block.module.graph):
            heads = site.repeat
            channels = heads[0] * heads[2] if heads else site.consumers[0].shape[1]
            fold(block.module, site, torch.exp(spread * torch.randn(channels, generator=random)))
        block.module.recompile()
    got = captured_runner(model)(feeds)["logits"]
    real = feeds["attention_mask"].bool()
    assert (got - want)[real].abs().max() < 1e-4 * want[real].abs().max()


# ---- graphs that set traps ------------------------------------------------------------------------------------------


class Trap(nn.Module):
    """Parts to build a graph of; `forward` is given."""

    def __init__(self, forward):
        super().__init__()
        self.norm, self.other, self.act = nn.LayerNorm(8), nn.LayerNorm(8), nn.ReLU()
        self.a, self.b, self.single = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


TRAPS = {
    "norm read by another consumer": (lambda m, x: m.a(y := m.norm(x)) + y.mean(-1, keepdim=True), "also read by"),
    "product of a linear with itself": (lambda m, x: m.b((y := m.a(x)) * y), "neither factor"),
    "linear read by another consumer": (lambda m, x: m.b((y := m.a(x)) * x.sin()) + y.sum(), "neither factor"),
    "one column for all channels": (lambda m, x: m.b(m.single(x) * x.sin()), "neither factor"),
    "gain of two norms": (lambda m, x: m.b(m.norm(m.a(m.norm(x)))), "gain of .* also used elsewhere"),
    "weight of two linears": (lambda m, x: m.a(m.other(m.a(m.norm(x)))), "weight of a is also used elsewhere"),
    "through the gate": (lambda m, x: m.b(torch.sigmoid(m.a(x)) * x.sin()), "neither factor"),
    "GELU": (lambda m, x: m.b(nn.functional.gelu(m.a(x))), "gelu.default, which a factor cannot pass"),
    "sum": (lambda m, x: m.b(m.a(x) + x.sin()), "add.Tensor, which a factor cannot pass"),
}


@pytest.mark.parametrize("forward, why", TRAPS.values(), ids=TRAPS)
def test_a_trap_is_explicit_and_says_why(forward, why):
    sites = fold_sites(block_of(Trap(forward)).graph)
    assert [s.kind for s in sites] == ["explicit"] * len(sites)
    assert any(re.search(why, s.why) for s in sites)


@pytest.mark.parametrize("forward", [f for f, _ in TRAPS.values()], ids=TRAPS)
def test_an_explicit_factor_springs_no_trap(forward):
    block, x = block_of(Trap(forward)), torch.randn(3, 5, 8)
    (want,) = block(x)
    for index, site in enumerate(fold_sites(block.graph)):
        factors = torch.rand(8, generator=torch.Generator().manual_seed(index)) + 0.5
        if site.scalable:
            fold(block, site, factors)
        else:
            with pytest.raises(PassError, match="also used elsewhere"):
                fold(block, site, factors)
    block.recompile()
    (got,) = block(x)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_positive_factor_passes_a_relu_and_a_product():
    relu = fold_sites(block_of(Trap(lambda m, x: m.b(m.act(m.a(x.sin()))))).graph)
    product = fold_sites(block_of(Trap(lambda m, x: m.b(m.a(x.sin()) * torch.sigmoid(x)))).graph)
    assert [s.kind for s in relu] == [s.kind for s in product] == ["explicit", "rows"]
