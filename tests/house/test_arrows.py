import runpy
import subprocess
import sys
from pathlib import Path

import pytest

arrows = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "arrows.py"))


@pytest.mark.slow
def test_no_room_imports_one_above_it():
    assert arrows["upward"](arrows["arrows"]()) == {}


def test_every_room_has_its_place():
    known = {name for line in arrows["ROOMS"] for name in line}
    assert {arrows["room"](module) for module in arrows["modules"]()} <= known


@pytest.mark.parametrize("pair", [("quant", "passes"), ("runtime", "quant"), ("sampling_study", "mixed_precision")])
def test_an_arrow_that_points_up_is_found(pair):
    assert arrows["upward"]({pair: ["somewhere"], ("passes", "quant"): ["fine"]}) == {pair: ["somewhere"]}


def test_what_runs_an_export_imports_no_torch():
    modules = "sys, qexport.runtime.bench_process, qexport.runtime.generate"
    code = f"import {modules}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
