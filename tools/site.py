"""Pages of the documentation that are made from the code and from files elsewhere in the repository.

A hook of MkDocs, which `make docs` runs. Nothing of it is kept: what the site says of commands, recipe keys and names
in Python is what the code says at that moment.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import typer
from mkdocs.structure.files import File
from pydantic.fields import FieldInfo

import qexport
from qexport.cli.app import PANELS, app, load_commands
from qexport.recipe.recipe import Recipe
from qexport.recipe.registry import KINDS, Method, methods
from qexport.recipe.sections import ActivationSpec, CalibrationSpec, Override, Section

HOME = Path(__file__).parents[1]
TITLES = {
    "model": "Over the whole model", "equalization": "Equalization", "branches": "Branches beside a linear",
    "weights": "Codes of weights", "cache": "Key/value cache",
}  # fmt: skip
# Where files of the repository stand on the site, both from their root; what stands nowhere is named without a link.
PLACES = {"README.md": "index.md", "passes/README.md": "passes.md", "samples/results/": "results/", "docs/": ""}
TABLES = sorted((HOME / "samples" / "results").glob("*.md"))
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """List every table of results."""
    (results,) = (part["Results"] for part in config.nav if "Results" in part)
    results.append({"Tables": [f"results/{table.name}" for table in TABLES]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    pages = {
        "reference/cli.md": cli_page(), "reference/recipe.md": recipe_page(), "reference/api.md": api_page(),
        "reference/files.md": files_page(), "index.md": brought("README.md"), "passes.md": brought("passes/README.md"),
        **{f"results/{table.name}": brought(f"samples/results/{table.name}") for table in TABLES},
    }  # fmt: skip
    for name, text in pages.items():
        files.append(File.generated(config, name, content="".join(text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between pages of docs are those of the repository."""
    path = HOME / "docs" / page.file.src_uri
    return linked(markdown, path, page.file.src_uri) if path.is_file() else markdown


def brought(source: str) -> str:
    """The text of a page of the repository as a page of the site."""
    text, page = (HOME / source).read_text("utf-8"), place(HOME / source)
    assert page is not None
    return linked(text, HOME / source, page).replace("](docs/", "](")  # pictures


def linked(markdown: str, path: Path, page: str) -> str:
    """A text with the links of a file of the repository as links of a page of the site."""

    def moved(match: re.Match[str]) -> str:
        text, target, part = match.groups()
        to = place((path.parent / target).resolve())
        return text if to is None else f"[{text}]({os.path.relpath(to, os.path.dirname(page) or '.')}{part or ''})"

    return _LINK.sub(moved, markdown)


def place(path: Path) -> str | None:
    """Where a file of the repository stands on the site; None where it does not."""
    name = path.relative_to(HOME).as_posix()
    found = ((old, new) for old, new in PLACES.items() if name.startswith(old))
    return next((new + name[len(old) :] if old.endswith("/") else new for old, new in found), None)


# --- the command line


def cli_page() -> Iterator[str]:
    load_commands()
    yield "# Command line\n\nMade from `qexport --help` and its kin.\n"
    found = typer.main.get_group(app).commands
    for panel in PANELS:
        yield f"\n## {panel}\n"
        for name, command in found.items():
            if getattr(command, "rich_help_panel", None) == panel:
                yield from command_part(name, command)


def command_part(name: str, command: Any) -> Iterator[str]:
    yield f"\n### qexport {name}\n\n{plain(command.help)}\n"
    if below := getattr(command, "commands", None):
        for other, part in below.items():
            yield from (line.replace("### qexport", "#### qexport") for line in command_part(f"{name} {other}", part))
        return
    given = [p for p in command.params if not getattr(p, "hidden", False)]
    arguments = " ".join(argument_name(p) for p in given if p.param_type_name == "argument")
    yield f"\n```\nqexport {name} {arguments} [OPTIONS]\n```\n\n| option | what it does |\n| --- | --- |\n"
    for parameter in given:
        if parameter.name != "help":
            yield f"| {option_name(parameter)} | {cell(plain(parameter.help))}{default_of(parameter)} |\n"


def argument_name(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper()
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def option_name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{argument_name(parameter)}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def default_of(parameter: Any) -> str:
    value = parameter.default
    shown = getattr(parameter, "show_default", True)
    if not shown or callable(value) or value in (None, False, (), [], ""):
        return ""
    return f" Default: `{getattr(value, 'value', value)}`."


def plain(text: str | None) -> str:
    return re.sub(r"\[/?(?:bold|dim|italic|cyan|green|yellow)\]", "", (text or "").replace("\f", "")).strip()


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- recipe keys


def recipe_page() -> Iterator[str]:
    yield "# Recipe keys\n\nMade from the classes that read them; [Recipes](../recipes.md) has them together.\n"
    yield from section_part("A recipe", Recipe, 2, without={name for name in Recipe.model_fields if name in keys()})
    parts = {"activations": ActivationSpec, "calibration": CalibrationSpec, "overrides, each": Override}
    for title, part in parts.items():
        yield from section_part(f"`{title}`", part, 2)
    for kind in KINDS:
        yield f"\n## {TITLES.get(kind, kind)}\n"
        for method in methods():
            if method.kind == kind:
                called = method.key if method.key == method.method else f"{method.key}: method: {method.method}"
                yield from section_part(f"`{called}`", method, 3, note=needs(method))


def keys() -> set[str]:
    """Keys of a recipe that are methods or sections with a table of their own."""
    return {method.key for method in methods()} | {"activations", "calibration", "overrides"}


def needs(method: type[Method]) -> str:
    said = [
        "calibration data" if method.calibrates else "",
        "a scheme with quantized activations" if method.for_activations else "",
        "grouped attention" if method.needs_grouped_attention else "",
    ]
    return f"Needs {' and '.join(filter(None, said))}.\n" if any(said) else ""


def section_part(title: str, section: type[Section], level: int, note: str = "", without: set[str] = frozenset()):
    """One section: what it is for, and a row for every key."""
    docstring = griffe.Docstring(section.__doc__ or "").parse("google")
    about = next((part.value for part in docstring if part.kind is griffe.DocstringSectionKind.text), "")
    said = {
        item.name: item.description
        for part in docstring if part.kind is griffe.DocstringSectionKind.attributes
        for item in part.value
    }  # fmt: skip
    yield f"\n{'#' * level} {title}\n\n{about}\n\n{note}"
    rows = [(name, field) for name, field in section.model_fields.items() if name not in without]
    if rows:
        yield "\n| key | values | default | what it does |\n| --- | --- | --- | --- |\n"
    described = {name: text for both, text in said.items() for name in re.split(r",\s*", both)}
    for name, field in rows:
        yield f"| `{name}` | {cell(values_of(field))} | {default_in(field)} | {cell(described.get(name, ''))} |\n"


def values_of(field: FieldInfo) -> str:
    kind = field.annotation
    parts = [part for part in getattr(kind, "__args__", ()) if part is not type(None)]
    if len(parts) == 1 and len(kind.__args__) == 2:  # or None, which the default says
        kind = parts[0]
    name = str(kind) if getattr(kind, "__args__", None) else getattr(kind, "__name__", str(kind))
    name = re.sub(r"typing\.|qexport\.[\w.]*\.|^Literal\[(.*)\]$", r"\1", name)
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [f"{signs[k]} {getattr(m, k)}" for m in field.metadata for k in signs if getattr(m, k, None) is not None]
    return ", ".join([f"`{name}`", *limits])


def default_in(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value!r}`" if isinstance(value, (bool, int, float, str, tuple)) or value is None else ""


# --- Python


def api_page() -> Iterator[str]:
    yield "# Python\n\nEverything public is a name of `qexport`, loaded when it is first used.\n"
    for name, (module, attribute) in sorted(qexport._WHERE.items()):
        if name == "Report":
            yield "\n## Report\n\nWhat `validate` gives: see [report and manifest](files.md).\n"
            continue
        heading = "" if attribute == name else f"    options: {{heading: {name}, toc_label: {name}}}\n"
        yield f"\n::: qexport.{module}.{attribute}\n{heading}"


def files_page() -> Iterator[str]:
    yield "# Report and manifest\n\n`report.json` is a Report and `manifest.json` a Manifest: fields are keys.\n"
    yield "\n::: qexport.validation.report\n\n::: qexport.artifact.manifest\n"
