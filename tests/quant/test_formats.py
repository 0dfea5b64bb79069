"""The registry of number formats: names, what a name of two formats is, and formats that packages bring."""

from importlib.metadata import EntryPoint

import pytest

from qexport import plugins
from qexport.errors import RecipeError
from qexport.quant.formats import IntegerFormat, Scheme, base, weight_format, weight_formats
from qexport.quant.formats.codebooks import NF4

BROUGHT = """
from dataclasses import dataclass
from qexport.quant.formats import IntegerFormat, weight_format

@weight_format
@dataclass(frozen=True)
class Int6(IntegerFormat):
    stem = "int6"
    options = ""
    examples = ("int6",)

    @classmethod
    def parse(cls, match):
        return cls(6, 32), None
"""


@pytest.fixture
def registry(monkeypatch):
    """The registry as it is, for a test to change."""
    monkeypatch.setattr(base, "_FORMATS", list(base._FORMATS))
    base._import_others.cache_clear()
    yield monkeypatch
    base._import_others.cache_clear()


def test_names_that_two_formats_read_are_an_error(registry):
    class Same(NF4):
        pass

    class Wider(NF4):
        stem = "nf[0-9]"

    class Late(NF4):  # whose examples do not show it
        stem, examples = r"nf4_g(?=64)", ()
        options = r"(?P<group>64)(?P<double>_dq)?"

    for cls in (Same, Wider):
        with pytest.raises(ValueError, match=f"{cls.__name__} and NF4 both read nf4"):
            weight_format(cls)
    weight_format(Late)
    assert Scheme.parse("nf4_g32").weight == NF4(32)
    with pytest.raises(ValueError, match="NF4 and Late both read 'nf4_g64'"):
        Scheme.parse("nf4_g64")


def test_packages_bring_formats_by_an_entry_point(registry, tmp_path):
    (tmp_path / "brought_format.py").write_text(BROUGHT)
    registry.syspath_prepend(tmp_path)
    points = [EntryPoint("int6", "brought_format", base.ENTRY_POINTS)]
    registry.setattr(plugins, "entry_points", lambda group: points if group == "qexport.formats" else [])
    assert Scheme.parse("INT6").weight.bits == 6
    assert [cls.__name__ for cls in weight_formats()][-1] == "Int6" and IntegerFormat in weight_formats()
    with pytest.raises(RecipeError, match="unknown scheme 'int7'.*int6 and the like"):
        Scheme.parse("int7")


def test_a_package_that_cannot_be_imported_is_named(registry):
    points = [EntryPoint("broken", "no_such_module_anywhere", base.ENTRY_POINTS)]
    registry.setattr(plugins, "entry_points", lambda group: points)
    for _ in range(2):
        with pytest.raises(RecipeError, match="no_such_module_anywhere: its formats cannot be imported"):
            Scheme.parse("w4a16_g32")
