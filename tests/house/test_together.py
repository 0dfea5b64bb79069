"""Which tests share a process."""

from pathlib import Path
from types import SimpleNamespace

from helpers import together

ROOT = Path(__file__).parents[2]


def test_files_that_stay_together_are_there_and_in_one_group_each():
    files = [file for group in together._TOGETHER for file in group]
    firsts = {group[0] for group in together._TOGETHER}
    assert all((ROOT / file).is_file() for file in (*files, *together._LONG))
    assert len(set(files)) == len(files) and {*files} & {*together._LONG} <= firsts


def test_a_group_goes_by_the_name_of_its_first_file():
    config = SimpleNamespace(getvalue=lambda name: ["popen"], option=SimpleNamespace(loadscopereorder=True))
    found = together.Together(config)
    for group in together._TOGETHER:
        assert {found._split_scope(f"{file}::test_one[a::b]") for file in group} == {group[0]}
    assert found._split_scope("tests/quant/test_metrics.py::test_one") == "tests/quant/test_metrics.py"
