import runpy
from pathlib import Path

import pytest

arrows = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "arrows.py"))


def test_no_room_imports_one_above_it():
    assert arrows["upward"](arrows["arrows"]()) == {}


def test_every_room_has_its_place():
    known = {name for line in arrows["ROOMS"] for name in line}
    assert {arrows["room"](module) for module in arrows["modules"]()} <= known


@pytest.mark.parametrize("pair", [("quant", "passes"), ("runtime", "quant"), ("sampling_study", "mixed_precision")])
def test_an_arrow_that_points_up_is_found(pair):
    assert arrows["upward"]({pair: ["somewhere"], ("passes", "quant"): ["fine"]}) == {pair: ["somewhere"]}
