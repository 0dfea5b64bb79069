"""What pyproject.toml puts into a wheel is all of the package; an editable installation would not tell."""

import ast
import inspect
import shutil
import subprocess
import tomllib
from pathlib import Path
from unittest.mock import Mock

import pytest

import qexport

ROOT = Path(__file__).parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder(package: str) -> Path:
    """Where the files of a package lie; `passes` stands beside the others."""
    return ROOT / package.replace("qexport.passes", "passes").replace(".", "/")


def test_every_package_is_named():
    found = {path.parent for top in ("qexport", "passes") for path in (ROOT / top).rglob("__init__.py")}
    assert found == {folder(package) for package in SETUP["packages"]}


def test_nothing_lies_at_the_top_that_does_not_belong_there():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in listed.split("\0") if name} == {
        "pyproject.toml", "README.md", "qexport", "passes", "tests", "samples", "docs", "findings", "tools", "LICENSE",
        "Makefile", "constraints.txt", "mkdocs.yml", ".ci", ".gitignore",
    }  # fmt: skip


def test_every_file_that_is_no_module_is_named():
    named = {
        path for package, patterns in SETUP["package-data"].items()
        for pattern in patterns for path in folder(package).glob(pattern)
    }  # fmt: skip
    found = {path for path in (ROOT / "qexport").rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == named and any(path.suffix == ".yaml" for path in named)


def test_type_checkers_are_told_that_the_package_has_types():
    assert (ROOT / "qexport" / "py.typed").is_file() and "py.typed" in SETUP["package-data"]["qexport"]


def test_a_missing_runtime_is_said_with_what_to_install(run, monkeypatch):
    absent = ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
    monkeypatch.delitem(vars(qexport), "optimize", raising=False)
    with monkeypatch.context() as patched, pytest.raises(qexport.QExportError, match=r"not installed. pip .*\[cpu\]"):
        patched.setattr(qexport, "import_module", Mock(side_effect=absent))
        qexport.optimize  # noqa: B018
    monkeypatch.setattr(qexport, "bench", Mock(side_effect=absent))
    code, _, said = run("bench", "anything")
    assert code == 2 and said.startswith("error: ONNX Runtime is not installed") and said.count("\n") == 1


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "qexport" / "__init__.py").read_text())
    seen = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    imported = {
        name.asname or name.name: (found.module, name.name)
        for found in seen.body if isinstance(found, ast.ImportFrom) for name in found.names
    }  # fmt: skip
    assert imported == qexport._WHERE and {*imported, "__version__"} == set(qexport.__all__)


@pytest.mark.parametrize("name", ["export", "export_auto", "inspect", "validate", "generate", "bench", "study"])
def test_a_call_says_what_it_takes(name):
    call = getattr(qexport, name)
    parameters = inspect.signature(call).parameters
    assert all(f"\n        {parameter}: " in call.__doc__ for parameter in parameters), "one parameter a line"
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())
