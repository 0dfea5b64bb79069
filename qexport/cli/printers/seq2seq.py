"""Results of encoder-decoders as text for people."""

from typing import Any

from ...api.seq2seq.exporting import Parted, Seq2SeqResult
from ...api.seq2seq.validating import Seq2SeqReport
from ...validation.formatting import number
from ..console import print_table
from .summaries import export_summary, print_export, print_inspection, print_kept


def summary(result: Seq2SeqResult) -> dict[str, Any]:
    """What an export did, in plain types."""
    parts = {"encoder": export_summary(result.encoder), "decoder": export_summary(result.decoder)}
    return {"folder": str(result.folder), **parts, "kept": result.kept}


def print_exported(result: Seq2SeqResult) -> None:
    """Both parts, and what to do next."""
    for part in (result.encoder, result.decoder):
        print_export(part)
    print_kept(result.kept)
    print(
        f"Next: qexport validate {result.folder} --reference MODEL --text FILE; qexport generate {result.folder} "
        "--prompt TEXT"
    )


def print_inspected(found: Parted, all_layers: bool) -> None:
    """Both parts."""
    for part in (found.encoder, found.decoder):
        print_inspection(part, all_layers)
        print()


def print_validated(report: Seq2SeqReport) -> None:
    """The measures of the whole, and what is to be said of the parts."""
    logits = report.logits
    spread = ", ".join(map(number, (logits.kl_mean, logits.kl_median, logits.kl_p99)))
    print_table(
        ["measure", "value"],
        [
            ["KL from float: mean, median, 99 %", spread],
            ["float model's texts, perplexity", f"{number(logits.float_perplexity)} -> {number(logits.perplexity)}"],
            ["same token likeliest", f"{100 * logits.top1_agreement:.1f} %"],
        ],
    )
    for name, part in (("encoder", report.encoder), ("decoder", report.decoder)):
        worst = min((row for row in part.outputs if row.sqnr_db is not None), key=lambda row: row.sqnr_db, default=None)
        if worst:
            print(f"{name}: worst output {worst.name}, {worst.sqnr_db:.1f} dB; {name}/report.html has every layer")
        if part.reader:
            print(f"{name}: {part.reader.sentence()}")
    print()
    for sentence in report.verdict:
        print(f"- {sentence}")
