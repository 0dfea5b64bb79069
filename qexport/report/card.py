"""README.md of an export, as the Hugging Face Hub expects a model card: what it is, how to run it, what it is worth."""

import re
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from ..artifact.manifest import GENAI_FILE, is_part
from ..artifact.ownership import CARD_MARK
from ..artifact.scratch import write_whole
from ..artifact.tokenizer import TEMPLATE
from ..formatting import megabytes
from ..runtime.genai import context_length
from ..validation.formatting import summary_rows
from . import facts
from .exported import Exported, recipe_settings
from .html import environment

CARD_FILE = "README.md"
# Of the measures of a validation: the float model's path is the business of the machine it was on.
_LEFT_OUT = ("reference",)
_LENGTH = 256  # tokens of a text in the card's code


def write_card(exported: Exported) -> Path | None:
    """Write README.md into an exported folder; None, and nothing is written, where somebody wrote their own."""
    path = exported.folder / CARD_FILE
    if path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    write_whole(path, render_card(exported))
    return path


def render_card(exported: Exported) -> str:
    """The model card, with numbers where the export was validated."""
    manifest, report = exported.manifest, exported.report
    genai = (exported.folder / GENAI_FILE).is_file()
    return environment().get_template("card.md").render(
        ours=Markup(CARD_MARK), front=Markup(front_matter(exported)), model=exported.model, code=code, text=text,
        hub_id=exported.source.get("hub_id"), recipe=exported.recipe_name, manifest=manifest, report=report,
        scheme=str(recipe_settings(exported.recipe).get("scheme") or ""),
        sizes={_PARTS[key]: megabytes(manifest.bytes[key]) for key in _PARTS if manifest.bytes.get(key)},
        measures=[row for row in summary_rows(report) if row[0] not in _LEFT_OUT] if report else [],
        quality=facts.quality(report) if report else None,
        licence=_licence(exported), genai=genai, chat=(exported.folder / TEMPLATE).is_file(),
        max_length=min(_LENGTH, context_length(exported.folder) or _LENGTH) if genai else None,
    )  # fmt: skip


_PARTS = {
    "model": "whole model", "quantized_linears": "quantized linears", "embedding": "embedding",
    "lm_head": "output projection", "rest": "the rest",
}  # fmt: skip


def front_matter(exported: Exported) -> str:
    """The card's metadata as YAML, only what is known."""
    licence = _licence(exported)
    known: dict[str, Any] = {"base_model": exported.source.get("hub_id"), **licence}
    del known["file"]
    if known["base_model"]:
        known["base_model_relation"] = "quantized"
    known["library_name"] = "onnxruntime"
    if exported.manifest.kind == "decoder" and not is_part(exported.manifest):
        known["pipeline_tag"] = "text-generation"
    schemes = sorted({linear.scheme for linear in exported.manifest.linears})
    known["tags"] = ["onnx", "onnxruntime", "quantized", "qexport", *schemes]
    return yaml.safe_dump(
        {k: v for k, v in known.items() if v}, sort_keys=False, allow_unicode=True, width=1000
    )  # fmt: skip


def _licence(exported: Exported) -> dict[str, str | None]:
    """What is known of the source model's licence, None for the rest; see `models.provenance.licence_of`."""
    known = exported.source.get("licence")
    known = known if isinstance(known, dict) else {}
    return {key: known.get(key) for key in ("license", "license_name", "license_link", "file")}


def code(value: object) -> Markup:
    """A string as code in a line of Markdown, whatever is in it."""
    line = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, room = "`" * (longest + 1), " " if longest else ""
    # In code of Markdown nothing is markup, so nothing may be escaped, except what ends a cell of a table.
    return Markup("{0}{1}{2}{1}{0}").format(fence, room, Markup(line.replace("|", "\\|")))


def text(value: object) -> Markup:
    """A string as text of Markdown: no markup of its own, in HTML neither."""
    line = str(escape(" ".join(str(value).split())))
    return Markup(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line))
