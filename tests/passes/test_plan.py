"""Every linear gets a decision, and a reason wherever the decision is not what was asked for."""

import pytest
import torch

import qexport
from helpers.pass_runs import plan_of
from helpers.random_decoders import FAMILIES
from qexport.plan.linear_plan import fit, make_plan, weight_bytes
from qexport.quant.formats import Scheme


def fitted(scheme, width):
    found, reason = fit(Scheme.parse(scheme), width)
    return found and found.name, reason


@pytest.mark.parametrize(
    "scheme, width, found",
    [
        ("w4a16_g32", 64, "w4a16_g32"),
        ("w4a16_g128", 96, "w4a16_g32"),
        ("w4a16_g128", 64, "w4a16_g64"),
        ("w4a16_g256_asym", 1536 + 16, "w4a16_g256_asym"),  # the last group is shorter
        ("w4a8_g64_static", 96, "w4a8_g64_static"),
        ("w4a8_g64_int", 96, "w4a8_g32_int"),  # which the int8 weights made at load do not allow
        ("w2a16_g64", 96, "w2a16_g32"),
        ("w4a16_pc", 7, "w4a16_pc"),
        ("w8a8_dyn", 7, "w8a8_dyn"),
        ("w4a16_g32", 8, None),
        ("w8a16_g16", 100, "w8a16_g16"),
        ("nf4", 100, None),
    ],
)
def test_groups_shrink_until_they_divide_the_width(scheme, width, found):
    name, reason = fitted(scheme, width)
    assert name == found
    assert (reason == "") == (found == scheme)
    if reason:
        assert reason.startswith(f"{width} input features do not divide into groups of")
    if found and reason:
        size = Scheme.parse(found).weight.group_size
        assert reason.endswith(f"groups of {size}") and width % size == 0


def test_the_format_follows_the_name():
    scheme, _ = fit(Scheme.parse("w4a8_g128_asym"), 96)
    assert scheme == Scheme.parse(scheme.name) == Scheme.parse("w4a8_g32_asym")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_is_planned(captured, family):
    plan = plan_of(captured(family), "w4a16_g32")
    assert len(plan) == {"opt": 13, "gpt_neox": 9, "phi3": 9, "gemma3": 22}.get(family, 15)
    assert all(p.scheme.name == "w4a16_g32" and p.reason == "" for p in plan.values())
    assert [p.name for p in plan.values() if p.block == "epilogue"] == ["lm_head"]
    assert all(p.name.startswith(p.block) for p in plan.values() if p.block != "epilogue")


def test_fallbacks_of_a_model_say_why(captured):
    plan = plan_of(captured("llama"), "w4a8_g64_int")  # 64 features wide, 96 in the middle
    changed = {name.rpartition(".")[2]: p for name, p in plan.items() if p.reason}
    assert set(changed) == {"down_proj"}
    assert changed["down_proj"].scheme.name == "w4a8_g32_int"
    assert changed["down_proj"].reason == "96 input features do not divide into groups of 64: groups of 32"


def test_float_by_recipe_says_so(captured):
    graphs = [(block.name, block.module.graph) for block in captured("llama").blocks]
    plans = make_plan(graphs, lambda name: None)
    assert {p.scheme for p in plans} == {None}
    assert {p.reason for p in plans} == {"kept in float by the recipe"}


@pytest.mark.parametrize(
    "scheme, size",
    [
        ("w4a16_g32", 64 * 96 // 2 + 4 * 64 * 3),
        ("w4a16_g32_asym", 64 * 96 // 2 + 4 * 64 * 3 + 64 * 2),  # three zero points of a row take two bytes
        ("w8a16_g32_asym", 64 * 96 + 4 * 64 * 3 + 64 * 3),
        ("w4a16_g64", 64 * 128 // 2 + 4 * 64 * 2),  # half a block takes the place of one
        ("w4a16_pc", 64 * 96 // 2 + 4 * 64),
        ("w8a8_static", 64 * 96 + 4 * 64),
    ],
)
def test_bytes_count_codes_scales_and_zero_points(captured, scheme, size):
    plan = plan_of(captured("llama"), scheme)["model.layers.0.mlp.down_proj"]
    assert plan.shape == (64, 96)
    assert plan.bytes == weight_bytes(plan) == size


def test_a_linear_of_a_constant_is_computed_on_loading_and_stays_float(tmp_path):
    class Biased(torch.nn.Module):
        """Adds what a linear makes of a table to what one makes of the input."""

        def __init__(self):
            super().__init__()
            self.of_table, self.of_input = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.register_buffer("table", torch.randn(1, 32))

        def forward(self, x):
            return self.of_input(x) + self.of_table(self.table)

    model, x = Biased().eval(), torch.randn(3, 32)
    made = qexport.export(model, "w8a8_dyn", out_dir=tmp_path / "out", example_inputs=(x,), calibration=[(x,)])
    assert [entry.name for entry in made.manifest.linears] == ["of_input"]
