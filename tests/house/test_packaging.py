"""What pyproject.toml puts into a wheel is all of the package; an editable installation would not tell."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder(package: str) -> Path:
    """Where the files of a package lie; `passes` stands beside the others."""
    return ROOT / package.replace("qexport.passes", "passes").replace(".", "/")


def test_every_package_is_named():
    found = {path.parent for top in ("qexport", "passes") for path in (ROOT / top).rglob("__init__.py")}
    assert found == {folder(package) for package in SETUP["packages"]}


def test_every_file_that_is_no_module_is_named():
    named = {
        path for package, patterns in SETUP["package-data"].items()
        for pattern in patterns for path in folder(package).glob(pattern)
    }  # fmt: skip
    found = {path for path in (ROOT / "qexport").rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == named and any(path.suffix == ".yaml" for path in named)
