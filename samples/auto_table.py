"""Schemes chosen linear by linear beside one scheme for all, at the same sizes, as a Markdown table.

    python samples/auto_table.py MODEL --calibration train.txt --text test.txt --schemes w4a16_g32 --sizes 105.5MB

MODEL is a Hugging Face id or a folder. Every scheme is exported as the preset `compact` with that scheme everywhere,
output projection and embedding included; then schemes are chosen for each of the sizes that came out, and for the sizes
given. Bytes are those of model.onnx and its data: every weight, the embedding and the output projection counted. KL and
perplexity are those of the deployed files, with the accuracy level that ships, on the first windows of the text, which
should not be the calibration text.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from qexport.api.auto import export_auto
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.cli.console import showing_progress
from qexport.formatting import megabytes, parsed_bytes
from qexport.recipe.recipe import Recipe
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.report import Logits
from qexport.validation.text import choose_text

HEADER = ["files", "schemes", "KL mean", "KL 99 %", "perplexity, float", "top-1", "exports"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--schemes", nargs="*", default=[], help="for all linears, one row each")
    parser.add_argument("--sizes", nargs="*", default=[], help="such as 86.3MB")
    given = parser.parse_args()

    sizes = [parsed_bytes(size) for size in given.sizes]
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for name in given.schemes:
        size, scores = one_scheme(given, name)
        print_row([megabytes(size), f"{name} everywhere", *measures(scores), "1"])
        sizes.append(size)
    for size in sorted(sizes):
        with tempfile.TemporaryDirectory(prefix="qexport-") as folder, showing_progress() as progress:
            found = export_auto(
                given.model, out_dir=Path(folder) / "out", max_bytes=size, calibration=given.calibration,
                text=given.text, windows=given.windows, window=given.window, progress=progress,
            )  # fmt: skip
        counts = ", ".join(f"{n} {scheme}" for scheme, n in Counter(found.schemes.values()).most_common())
        taken = megabytes(found.export.manifest.bytes["model"])
        print_row([taken, f"chosen: {counts}", *measures(found.logits), str(found.exports)])


def one_scheme(given: argparse.Namespace, name: str) -> tuple[int, Logits]:
    """Bytes and scores of an export with one scheme everywhere."""
    recipe = Recipe.load("compact").model_copy(update={"name": name, "scheme": name, "lm_head": name})
    captured = capture_model(given.model)
    text = choose_text(captured, given.text, given.windows, given.window, lambda what, done, total: None)
    reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder, showing_progress() as progress:
        result = export(
            given.model, recipe, out_dir=Path(folder) / "out", calibration=given.calibration, progress=progress
        )
        scores = compare_logits(reference, text.windows, deployed_logits(result.folder, result.manifest, given.window))
    return result.manifest.bytes["model"], scores


def measures(scores: Logits) -> list[str]:
    perplexities = f"{scores.perplexity:.4g}, {scores.float_perplexity:.4g}"
    return [f"{scores.kl_mean:.4f}", f"{scores.kl_p99:.3g}", perplexities, f"{scores.top1_agreement:.1%}"]


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
