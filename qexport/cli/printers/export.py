"""What `qexport export` prints."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...api.auto import AutoResult
from ...api.compressing import compressed
from ...api.result import ExportResult
from ...artifact.manifest import VISION_LANGUAGE
from ...artifact.tokenizer import TEMPLATE
from ...formatting import megabytes
from ...mixed_precision.curve import CurvePoint
from ...passes.moe_coverage import FEW_TOKENS
from ...plan.linear_plan import Planned
from ...plan.model_plan import described_embedding
from ...validation.formatting import number
from ..console import print_table
from .shared import described, print_fast, sizes_by_part


def export_summary(result: ExportResult) -> dict[str, Any]:
    """What an export did, in plain types."""
    return {
        "folder": str(result.folder),
        "target": result.manifest.target,
        "bytes": dict(result.manifest.bytes),
        "calibration": result.calibration,
        "codes": result.codes,
        "reference": asdict(result.reference),
        "seconds": dict(result.seconds),
        "quantized_linears": len(result.manifest.linears),
        "quantized_convolutions": len(result.manifest.convolutions),
        "embeddings": [described_embedding(e) for e in result.embeddings],
        "fast_linears": sum(linear.fast is True for linear in result.manifest.linears),
        "exceptions": [
            {"linear": p.name, "scheme": p.scheme.name if p.scheme else "float", "reason": p.reason}
            for p in [*result.plan, *result.convolutions]
            if p.reason
        ],
        "dense_experts": [{"experts": name, "reason": why} for name, why in result.dense.items()],
        "rarely_chosen": [{"linear": name, "tokens": what} for name, what in result.rarely_chosen.items()],
        "kept": result.kept,
        "unseen_features": [{"linear": n, "share": round(share, 4)} for n, share in result.unseen.items()],
        "warnings": list(result.warnings),
        "parts": {name: export_summary(part) for name, part in result.parts.items()},
    }


def auto_summary(found: AutoResult) -> dict[str, Any]:
    """The same, with the choice and what it led to under "auto"."""
    drawn = {"curve": found.curve.as_dict()} if found.curve is not None else {}
    return export_summary(found.export) | {"auto": found.as_dict()} | drawn


def print_auto(found: AutoResult, model: str = "MODEL") -> None:
    """The export, and how close to the float model the chosen schemes are."""
    print_export(found.export, model)
    chosen, scores = found.as_dict(), found.logits
    counts = ", ".join(f"{n} {scheme}" for scheme, n in sorted(chosen["schemes"].items(), key=lambda s: -s[1]))
    print(f"  chosen: {counts}, in {found.exports} exports" if found.exports > 1 else f"  chosen: {counts}")
    if found.cache.numbers:
        size = megabytes(found.cache.bytes)
        print(f"  cache of {found.asked['context']:,.0f} tokens: {size} in {found.cache.numbers}")
    print(
        f"  KL {number(scores.kl_mean)} a token (predicted {number(found.predicted_kl)}), perplexity"
        f" {number(scores.float_perplexity)} -> {number(scores.perplexity)}, on {found.text}"
    )
    if found.curve is not None:
        print()
        print_table(["model", "KL", "", "schemes", "recipe"], [_curve_row(point) for point in found.curve.points])


def _curve_row(point: CurvePoint) -> list[str]:
    schemes = ", ".join(f"{n} {scheme}" for scheme, n in sorted(point.schemes.items(), key=lambda s: -s[1]))
    how = "measured" if point.measured else "estimated"
    return [megabytes(point.bytes), number(point.kl), how, schemes, point.recipe]


def print_export(result: ExportResult, model: str = "MODEL") -> None:
    """Where it is, how large, what was not done as asked, and what to do next; of two parts one after the other.

    Args:
        model: what was exported, as the arguments of the commands that come next name it.
    """
    for part in result.parts.values():
        _print_file(part)
    if result.parts:
        print_kept(result.kept)
        pictures = " --image FILE" if result.manifest.kind == VISION_LANGUAGE else ""
        _print_next(result, model, " --text FILE", generates=True, pictures=pictures)
        return
    _print_file(result)
    if result.manifest.kind == "encoder":
        _print_next(result, model, " --text FILE", generates=False)
    if result.manifest.kind == "decoder":
        _print_next(result, model, "", generates=True)


def _print_file(result: ExportResult) -> None:
    """What became of one file."""
    sizes, quantized = result.manifest.bytes, [p for p in result.plan if p.scheme is not None]
    shared = {e.linear for e in result.embeddings}
    weights = 4 * sum(p.shape[0] * p.shape[1] for p in quantized if p.name not in shared and not p.shares)
    print(f"{result.folder}: {megabytes(sizes['model'])} for {result.manifest.target}")
    small = sum(entry.bytes for entry in result.manifest.linears)
    print(
        f"  {len(quantized)} of {len(result.plan)} linears quantized, {megabytes(weights)} in float32"
        f" -> {megabytes(small)}"
    )
    if result.convolutions:
        print(f"  {len(result.manifest.convolutions)} of {len(result.convolutions)} convolutions quantized")
    print(f"  {sizes_by_part(sizes)}")
    for embedding in result.embeddings:
        print(f"  {described(embedding)}")
    print(f"  reference: {result.reference.sentence()}")
    if result.codes:
        print(f"  codes: {result.codes}; each was compared with the formula of its method")
    print(f"  calibration: {result.calibration}")
    print(f"  seconds: {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in result.seconds.items())}")
    _print_exceptions([*result.plan, *result.convolutions])
    for reason, count in Counter(result.dense.values()).most_common():
        print(f"  {count} mixtures of experts compute every expert for every token: {reason}")
    if rare := result.rarely_chosen:
        print(f"  fewer than {FEW_TOKENS} calibration tokens chose the experts of {len(rare)} linears: see report.json")
    print_kept(result.kept)
    print_fast([linear.slow for linear in result.manifest.linears if linear.fast is not None], "  ")


def print_kept(kept: list[str]) -> None:
    """Files that a replaced folder held."""
    if kept:
        print(f"  kept, as no export wrote them: {', '.join(kept)}")


def _print_next(result: ExportResult, model: str, text: str, *, generates: bool, pictures: str = "") -> None:
    """The commands that go on from here, to be copied."""
    folder = shlex.quote(str(result.folder))
    print(f"Next: qexport validate {folder} --reference {model}{text}")
    if generates and (result.folder / TEMPLATE).is_file() and not pictures:
        print(f"      qexport chat {folder}")
    elif generates:
        print(f'      qexport generate {folder}{pictures} --prompt "Once upon a time"')


def _print_exceptions(plan: Sequence[Planned]) -> None:
    for first, name, count in compressed(p for p in plan if p.reason):
        print(f"  {name} ({count}): {first.scheme.name if first.scheme else 'float'}, {first.reason}")
