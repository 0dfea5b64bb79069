"""What `qexport report` prints."""

from pathlib import Path
from typing import Any

from ...report.comparing import Comparison, Pair
from ...report.exported import read_validated
from ...validation.formatting import with_error
from ..console import print_table
from .validate import print_validation

_MOST_LINEARS = 12


def rendered_summary(page: Path) -> dict[str, Any]:
    """What report.html was made of, in plain types."""
    exported = read_validated(page.parent)
    return {
        "html": str(page), "bytes": dict(exported.manifest.bytes), "validation": exported.validation.as_dict(),
    }  # fmt: skip


def print_rendered(page: Path) -> None:
    """The measures, the verdict, and where the page is."""
    print_validation(read_validated(page.parent).validation)
    print(f"\n{page}")


def print_comparison(found: Comparison) -> None:
    """Measures side by side, then window by window, then the linears that got worse by the most."""
    print_table(["measure", *found.folders], [[m.name, *m.text] for m in found.measures])
    if found.paired:
        print(f"\nSecond less first, window by window over {found.paired[0].windows} windows:\n")
        columns = ["measure", "difference", "p"]
        print_table(columns, [[t.name, with_error(t.difference, t.error), f"{t.p:.2g}"] for t in found.paired])
    if found.linears:
        worse = sum(p.worse for p in found.linears)
        print(f"\n{worse} of {len(found.linears)} linears have a lower own SQNR (dB) in the second; those first:\n")
        columns = ["linear", "scheme", "second", "own SQNR", "second", "difference", "bytes", "second"]
        print_table(columns, [_row(p) for p in found.linears[:_MOST_LINEARS]])
        if len(found.linears) > _MOST_LINEARS:
            print(f"and {len(found.linears) - _MOST_LINEARS} more; --json has all")
    for names, which in zip(found.only, ("first", "second"), strict=True):
        if names:
            print(f"Quantized only in the {which}: {len(names)} linears, {names[0]} the first of them")
    for sentence in (*found.verdict, *found.notes):
        print(f"- {sentence}")


def _row(pair: Pair) -> list[object]:
    numbers = ["" if v is None else round(v, 1) for v in (*pair.own_sqnr_db, pair.difference)]
    return [pair.name, *pair.schemes, *numbers, *("" if b is None else b for b in pair.bytes)]
