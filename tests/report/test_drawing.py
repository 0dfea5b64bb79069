"""Figures as data: the numbers of the report at the right places, and nothing for what was not measured."""

import math

import pytest

from helpers.report_folders import KINDS, full_report, plain_report
from qexport.report.drawing import depth, figures, heat_maps, kind, ranges
from qexport.validation.report import InputRange, LayerComparison, ValueComparison


def test_a_plain_report_has_maps_and_the_line_along_the_model():
    assert [f.key for f in figures(plain_report())] == ["own", "inherited", "depth"]


def test_a_full_report_has_every_figure():
    keys = [f.key for f in figures(full_report())]
    assert keys == ["own", "inherited", "cost", "depth", "position", "margin", "cost", "greedy", "range_0", "range_1"]


def test_bars_say_how_often_the_likeliest_token_changes_where_the_model_is_unsure():
    (figure,) = [f for f in figures(full_report()) if f.key == "margin"]
    assert [(bar.label, bar.value) for bar in figure.bars] == [("0 to 0.02", 50.0), ("0.7 to 1", 1.0)]
    assert figure.bars[0].title == "12 tokens: 50.00% differ"


def test_a_map_has_layers_as_columns_and_projections_as_rows():
    own, inherited = heat_maps(plain_report(3).layers.linears)
    assert own.columns == ("0", "1", "2") and own.rows == ("q_proj", "o_proj", "up_proj", "down_proj")
    assert len(own.cells) == 12
    # Own SQNR: 40 for q_proj of layer 0 down to 40 - 2 - 9 for down_proj of layer 2.
    assert (own.cells[0, 0].badness, own.cells[3, 2].badness) == (0, 1) and own.cells[3, 2].text == "29.0"
    assert own.cells[1, 1].badness == pytest.approx((40 - 36) / 11)
    assert own.cells[3, 2].title == "model.layers.2.mlp.down_proj (w4a16_g32): 29.0 dB"
    assert (own.best, own.worst) == ("40 dB", "29 dB")
    assert [inherited.cells[k, 2].text for k in range(4)] == ["28.0"] * 4


def test_costs_are_bad_when_high():
    cost = heat_maps(full_report().layers.linears)[2]
    assert cost.cells[0, 0].badness == 0 and cost.cells[3, 2].badness == 1 and cost.cells[3, 2].text == "12.0"


def test_broken_and_equal_values_are_told_from_numbers():
    def row(layer, name, sqnr, error):
        return ValueComparison(
            name=f"l.{layer}.{name}", block=f"l.{layer}", sqnr_db=sqnr, own_sqnr_db=sqnr, max_abs_error=error
        )

    rows = [row(0, "a", math.nan, math.nan), row(1, "a", math.inf, 0.0), row(2, "a", 20.0, 1.0)]
    own = heat_maps(rows)[0]
    assert [(own.cells[0, j].text, own.cells[0, j].broken) for j in range(3)] == [
        ("NaN", True), ("=", False), ("20.0", False),
    ]  # fmt: skip
    assert own.cells[0, 0].badness == 1 and "NaN or Inf" in own.cells[0, 0].title


def test_a_model_without_repeated_layers_has_no_map():
    rows = [ValueComparison(name=n, block="prologue", own_sqnr_db=20.0, max_abs_error=1.0) for n in ("first", "second")]
    assert heat_maps(rows) == [] and heat_maps([]) == []


def test_names_without_the_block_are_as_short_as_they_can_be():
    rows = [
        ValueComparison(name=f"m.{i}.{n}", block=f"m.{i}", own_sqnr_db=1.0, max_abs_error=1.0)
        for i in (0, 1)
        for n in ("a.proj", "b.proj", "c.out")
    ]
    assert heat_maps(rows)[0].rows == ("a.proj", "b.proj", "out")
    assert kind(ValueComparison(name="lm_head", block="epilogue")) == "lm_head"


def test_blocks_stand_at_the_number_of_their_layer():
    names = ("prologue", "model.layers.0", "model.layers.1", "epilogue")
    rows = tuple(
        ValueComparison(name=n, block=n, sqnr_db=s, own_sqnr_db=o, max_abs_error=1.0)
        for n, s, o in zip(names, (None, 30.0, 20.0, 19.0), (None, 30.0, 22.0, 131.0), strict=True)
    )
    (figure,) = depth(LayerComparison(tokens=1, linears=(), blocks=rows, sessions=1))
    whole, own = figure.series
    assert [(p.x, p.y) for p in whole.points] == [(-1, None), (0, 30.0), (1, 20.0), (2, 19.0)]
    assert own.points[-1].y is None and "131.0 dB" in own.points[-1].title, "rounding of float32 is no error"
    assert own.quiet and not whole.quiet


def test_positions_are_the_middles_of_equal_stretches():
    (figure,) = [f for f in figures(full_report()) if f.key == "position"]
    assert [(p.x, p.y) for p in figure.series[0].points] == [(4, 0.1), (12, 0.2), (20, None), (28, 0.4)]


def cost_bars(report):
    return [f for f in figures(report) if f.key == "cost" and hasattr(f, "bars")][0]


def test_bars_go_from_the_most_expensive_with_names_without_what_they_share():
    figure = cost_bars(full_report())
    *estimates, last = figure.bars
    values = [bar.value for bar in estimates]
    assert values == sorted(values, reverse=True) and values[0] == 0.012 and len(values) == 12
    assert figure.bars[0].label == "2.mlp.down_proj"
    # What restoring a linear brings is said, and not drawn as if it were an estimate.
    assert figure.bars[0].title == (
        "model.layers.2.mlp.down_proj: estimated 0.012; restored to float, KL falls by 0.02 (measured)"
    )
    titles = [bar.title for bar in estimates]
    assert "model.layers.0.mlp.up_proj: estimated 0.003; restored to float, KL rises by 0.001 (measured)" in (titles)
    assert "model.layers.0.self_attn.q_proj: estimated 0.001" in titles and not any(bar.apart for bar in estimates)
    assert "On 64 tokens of the text all estimates add up to 78% of what was measured there" in figure.caption


def test_a_measured_embedding_has_a_bar_apart():
    report = full_report()
    figure = cost_bars(report)
    last = figure.bars[-1]
    assert (last.label, last.value, last.apart) == ("embedding, measured", 0.004, True)
    assert last.title.startswith("the quantized embedding, in prologue: no estimate; restored to float")
    assert "The bar of another colour: no estimate" in figure.caption
    linears = {k: v for k, v in report.sensitivity.measured.items() if k != "prologue"}
    without = cost_bars(report.model_copy(update=dict(
        sensitivity=report.sensitivity.model_copy(update=dict(measured=linears)))))  # fmt: skip
    assert not any(bar.apart for bar in without.bars) and "another colour" not in without.caption


def test_bars_that_short_names_do_not_tell_apart_have_whole_ones():
    report = full_report(1)
    rows = [
        ValueComparison(name=f"{part}.layers.0.fc", block=f"{part}.layers.0", kl_cost=0.1, max_abs_error=1.0)
        for part in ("a", "b")
    ] + [ValueComparison(name="lm_head", block="epilogue", kl_cost=0.05, max_abs_error=1.0)]
    layers = report.layers.model_copy(update=dict(linears=tuple(rows)))
    bars = cost_bars(report.model_copy(update=dict(layers=layers, sensitivity=None))).bars
    assert [bar.label for bar in bars] == ["a.layers.0.fc", "b.layers.0.fc", "lm_head"]


def test_ranges_of_one_kind_make_one_figure():
    found = ranges(full_report().layers.ranges)
    assert [f.title for f in found] == ["Into q_proj", "Into o_proj"]
    before, after = found[0].series
    assert [p.y for p in before.points] == [50, 51, 52] and [p.y for p in after.points] == [5, 6, 7]
    assert found[0].caption == "Most clipped by its static scale: 0.20% in model.layers.2."
    nothing = [
        InputRange(block=f"b.{i}", linears=("x",), float_absmax=None, absmax=math.nan, float_spread=None, spread=None)
        for i in range(3)
    ]
    assert ranges(nothing) == []


def test_every_kind_of_linear_is_there():
    assert {kind(row) for row in plain_report().layers.linears} == set(KINDS)
