"""What a validation found, as data for report.json and as sentences for people."""

import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import InputError

FORMAT = 1
REPORT_FILE = "report.json"
KEY = "validation"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Finite = Annotated[float | None, BeforeValidator(_finite)]
"""A number; null in place of an infinity or NaN, which JSON does not have."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Frozen):
    """One value of the deployed model beside the same value of the float model.

    Attributes:
        name: of the linear, the block or the output; block: where it is.
        scheme: of a quantized linear, else empty.
        sqnr_db: signal to quantization noise in dB, the errors of everything in front included; null where the values
            are equal (max_abs_error is 0) or not finite (max_abs_error is null).
        own_sqnr_db: of the errors made here alone: the float linear (or block) is given what the deployed one is given.
            This is what finds the layer that broke.
        cosine: of the angle between the two values.
        max_abs_error: largest absolute difference; null when the deployed value holds NaN or Inf.
        rescaled: smoothing may have divided the output channels of this linear by factors that its reader takes back;
            it is compared up to one factor for each channel, and an error that is such a factor shows in its reader.
    """

    name: str
    block: str = ""
    scheme: str = ""
    sqnr_db: Finite = None
    own_sqnr_db: Finite = None
    cosine: Finite = None
    max_abs_error: Finite = None
    rescaled: bool = False


class Unfused(_Frozen):
    """A planned linear that did not become its kernel; found: the operator there instead, null where there is none."""

    name: str
    expected: str
    found: str | None


class Placement(_Frozen):
    """What ONNX Runtime made of the file.

    Attributes:
        provider: the execution provider asked for.
        nodes_per_provider: how many nodes each provider took.
        op_counts: operators of the optimized graph.
        kernels: for each kernel how many planned linears run as it.
        prompt_kernels: the same for prompts, where the file has a branch for them; what is measured is then of prompts.
        unfused: planned linears that do not run as planned.
    """

    provider: str
    nodes_per_provider: dict[str, int]
    op_counts: dict[str, int]
    kernels: dict[str, int]
    prompt_kernels: dict[str, int] = Field(default_factory=dict)
    unfused: tuple[Unfused, ...] = ()


class Layers(_Frozen):
    """The comparison value by value.

    Attributes:
        tokens: rows of every value, over the whole batch.
        linears: the quantized linears, in order; blocks: what each block hands on, in order.
        sessions: how many were needed to stay within the memory budget.
        moved: linears that ran as another operator while their values were read than they do in the deployed model.
    """

    tokens: int
    linears: tuple[Row, ...]
    blocks: tuple[Row, ...]
    sessions: int
    moved: tuple[Unfused, ...] = ()


class Activation(_Frozen):
    """A quantized activation, as the export left it.

    Attributes:
        block: where it is; linears: the products that read it.
        what: how it is quantized; bits: of its codes.
        kernel, kernel_without_zeros: the share of its elements that become zero on the calibration data (CrossQuant's
            quantization kernel, arXiv 2410.07505), and without those that are zero anyway; null where not measured.
    """

    block: str
    linears: tuple[str, ...]
    what: str
    bits: int
    kernel: Finite = None
    kernel_without_zeros: Finite = None


class Logits(_Frozen):
    """Next-token distributions of the float model and the deployed one. Logarithms are natural.

    Attributes:
        windows, window: number of texts and tokens in each; tokens: predicted ones, windows * (window - 1).
        kl_mean, kl_median, kl_p99: of KL(float || quantized), over tokens.
        top1_agreement: share of tokens for which both find the same one likeliest.
        float_perplexity, perplexity: exp of the mean negative log-likelihood of the text's tokens.
        nonfinite_tokens: tokens whose deployed logits hold NaN or Inf; when there are any the measures are null.
    """

    windows: int
    window: int
    tokens: int
    kl_mean: Finite
    kl_median: Finite
    kl_p99: Finite
    top1_agreement: float
    float_perplexity: Finite
    perplexity: Finite
    nonfinite_tokens: int = 0


class Report(_Frozen):
    """The key "validation" of report.json.

    Attributes:
        reference: the float model's name; text: what both models read.
        own_text: the float model wrote the text, or chance did: its perplexity compares with nothing else.
        layers, logits, placement: see their classes; logits is null for models without text.
        activations: every quantized activation.
        outputs: for models without text, each output over all inputs.
        problems: sentences about what has to be repaired; empty when the export does what was planned.
        verdict: everything in plain sentences, problems first.
        seconds: wall time by stage.
    """

    format: Literal[1] = FORMAT
    reference: str
    text: str
    own_text: bool = False
    layers: Layers
    activations: tuple[Activation, ...] = ()
    logits: Logits | None = None
    outputs: tuple[Row, ...] = ()
    placement: Placement
    problems: tuple[str, ...] = ()
    verdict: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What report.json gets: numbers, strings, lists and null."""
        return self.model_dump(mode="json")

    def summary_rows(self) -> list[tuple[str, str, str]]:
        """(measure, value, what it means) for a table."""
        rows = [("reference", self.reference, "the float model"), ("text", self.text, "what both models read")]
        if (scores := self.logits) is not None:
            kl = " / ".join(number(value) for value in (scores.kl_mean, scores.kl_median, scores.kl_p99))
            rows += [
                ("perplexity, float", number(scores.float_perplexity), f"over {scores.tokens} predicted tokens"),
                ("perplexity, quantized", number(scores.perplexity), "of the deployed file; lower is better"),
                ("KL mean / median / 99 %", kl, "how far the predictions move, per token; 0 is equal"),
                ("top-1 agreement", f"{scores.top1_agreement:.1%}", "both find the same next token likeliest"),
            ]
        rows += [(f"output {row.name}", decibels(row.sqnr_db, row), "SQNR over all inputs") for row in self.outputs]
        if self.layers.linears:
            worst = worst_first(self.layers.linears)[0]
            rows.append(
                ("worst linear", f"{worst.name}, {decibels(own(worst), worst)}", "SQNR of the errors it makes itself")
            )
        nodes = ", ".join(f"{n} on {p}" for p, n in self.placement.nodes_per_provider.items())
        rows.append(("kernels", kernels(self.placement), "what became of the quantized linears"))
        rows.append(("nodes", nodes, "where ONNX Runtime runs the graph"))
        return rows


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """Rows by the errors made in them alone: not finite first, then ascending own SQNR, equal ones last."""
    return sorted(rows, key=rank)


def own(row: Row) -> float | None:
    """The SQNR of a row that counts: of its own errors, where that is known."""
    return row.own_sqnr_db if row.own_sqnr_db is not None else row.sqnr_db


def rank(row: Row) -> float:
    """The same with the infinities and NaN (as minus infinity) that JSON lacks."""
    if (value := own(row)) is not None:
        return value
    # A nonzero error beside a zero signal is an SQNR of minus infinity.
    return math.inf if row.max_abs_error == 0 else -math.inf


def decibels(value: float | None, row: Row) -> str:
    """An SQNR of `row` for people."""
    if value is not None:
        return f"{value:.1f} dB"
    return "NaN or Inf" if row.max_abs_error is None else "equal" if row.max_abs_error == 0 else "no signal"


def kernels(placement: Placement) -> str:
    """What the quantized linears run as."""
    total = sum(placement.kernels.values())
    if not total:
        return "no quantized linears"
    text = f"{total} quantized linears run as {_counted(placement.kernels)}"
    return f"{text}, for prompts as {_counted(placement.prompt_kernels)}" if placement.prompt_kernels else text


def _counted(kernels: dict[str, int]) -> str:
    return next(iter(kernels)) if len(kernels) == 1 else ", ".join(f"{k} ({n})" for k, n in kernels.items())


def number(value: float | None) -> str:
    """Four digits, for people."""
    return "not finite" if value is None else f"{value:.4g}"


def save(report: Report, folder: Path) -> None:
    """Put the report under "validation" in the folder's report.json, beside what the export wrote; by rename.

    Raises:
        InputError: the folder cannot be written.
    """
    path = folder / REPORT_FILE
    whole = _read(path)
    whole[KEY] = report.as_dict()
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".report.", suffix=".json")
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})", place=str(folder), remedy="Copy it to a folder you own"
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=2, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(folder: str | Path) -> Report | None:
    """The validation in a folder's report.json; None where there is none."""
    data = _read(Path(folder) / REPORT_FILE).get(KEY)
    return None if data is None else Report.model_validate(data)


def exported_activations(folder: Path) -> tuple[Activation, ...]:
    """The quantized activations in a folder's report.json, by the account of the export; none without one."""
    found = []
    for block in _read(folder / REPORT_FILE).get("export", {}).get("blocks", ()):
        for _, what, data in block["changed"].get("QuantizeActivations", ()):
            known = {key: data[key] for key in ("linears", "bits", "kernel", "kernel_without_zeros") if key in data}
            found.append(Activation(block=block["name"], what=what, **known))
    return tuple(found)


def _read(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"unreadable: {error}", place=str(path), remedy="Delete it; it is only a record") from None
    return data if isinstance(data, dict) else {}
