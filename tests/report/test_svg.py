from xml.etree import ElementTree

import pytest

from helpers.report_folders import full_report, plain_report
from qexport.report import svg
from qexport.report.drawing import figures, heat_maps
from qexport.report.figures import Bar, Bars, HeatMap, Lines, Point, Series

HOSTILE = """<script>alert("x")</script>&'"""


def shapes(image, name, style=None):
    root = ElementTree.fromstring(str(image))
    return [e for e in root.iter(name) if style is None or style in e.get("class", "").split()]


def line(*values, **changes):
    points = tuple(Point(i, y, f"point {i}") for i, y in enumerate(values))
    return Lines("k", "title", "", "x", "y", (Series("s", points),), **changes)


def test_attributes_and_children_are_escaped():
    made = svg.tag("text", HOSTILE, class_=HOSTILE)
    parsed = ElementTree.fromstring(str(made))
    assert parsed.text == HOSTILE and parsed.get("class") == HOSTILE and "<script" not in made


def test_numbers_are_short_and_names_become_attributes():
    assert svg.tag("rect", x=1.0, y=2.345, stroke_width=3) == '<rect x="1" y="2.35" stroke-width="3"/>'


def test_every_figure_is_well_formed():
    for figure in figures(full_report()):
        images = svg.heat_map(figure) if isinstance(figure, HeatMap) else [
            svg.lines(figure) if isinstance(figure, Lines) else svg.bars(figure)
        ]  # fmt: skip
        for image in images:
            assert ElementTree.fromstring(str(image)).get("role") == "img"


def test_higher_values_stand_higher_and_gaps_break_the_line():
    image = svg.lines(line(1.0, 3.0, None, 2.0, 4.0))
    dots = [c for c in shapes(image, "circle") if c.get("r") == "2.2"]
    heights = [float(c.get("cy")) for c in dots]
    assert len(shapes(image, "path")) == 2 and heights[3] < heights[1] < heights[2] < heights[0]
    places = [float(c.get("cx")) for c in dots]
    assert places[1] - places[0] == pytest.approx((places[2] - places[1]) / 2, abs=0.02)


def test_on_a_logarithmic_axis_factors_are_distances():
    image = svg.lines(line(1.0, 10.0, 100.0, 0.0, log=True))
    a, b, c = [float(e.get("cy")) for e in shapes(image, "circle") if e.get("r") == "2.2"]
    assert a - b == pytest.approx(b - c, abs=0.02), "and zero is left out"


@pytest.mark.parametrize("values", [(5.0,), (0.0, 0.0), (1e-30, 1e-30), (-3.0, None), (1e30, 1.0)])
def test_axes_of_few_or_equal_values(values):
    assert "nan" not in svg.lines(line(*values)) and "nan" not in svg.lines(line(*values, from_zero=True))


def test_errors_are_drawn_of_what_is_not_quiet_and_fit():
    points = (Point(0, 1.0, "a", 0.5), Point(1, 2.0, "b"))
    figure = Lines("k", "t", "", "x", "y", (Series("loud", points), Series("low", points, quiet=True)), counted=False)
    image = svg.lines(figure)
    (error,) = shapes(image, "line", "error")
    top, bottom = sorted(float(error.get(y)) for y in ("y1", "y2"))
    dots = {float(c.get("cy")) for c in shapes(image, "circle") if c.get("cx") == "50"}
    assert len(dots) == 1 and dots.pop() == pytest.approx((top + bottom) / 2, abs=0.02) and bottom < 232 - 36
    assert "0.2" in [e.text for e in shapes(image, "text", "tick")], "temperatures are no whole numbers"


def test_bars_are_as_long_as_their_values_to_both_sides():
    image = svg.bars(Bars("k", "t", "", "x", tuple(Bar(str(v), str(v), v) for v in (4.0, 2.0, -1.0))))
    first, second, third = shapes(image, "rect")
    assert float(first.get("width")) == pytest.approx(2 * float(second.get("width")), abs=0.02)
    assert float(third.get("x")) + float(third.get("width")) == pytest.approx(float(first.get("x")), abs=0.02)


def test_maps_of_many_layers_keep_tooltips_and_drop_text():
    wide, many = heat_maps(plain_report(4).layers.linears)[0], heat_maps(plain_report(80).layers.linears)[0]
    for figure, texts in ((wide, 16), (many, 0)):
        _, cells = svg.heat_map(figure)
        groups = shapes(cells, "g", "cell")
        assert len(groups) == len(figure.cells) and all(len(g.findall("title")) == 1 for g in groups)
        assert sum(len(g.findall("text")) for g in groups) == texts
