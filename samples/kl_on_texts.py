"""How far exports of one model are from it on texts of different kinds, as a Markdown table.

    python samples/kl_on_texts.py MODEL compact balanced other=FOLDER --calibration train.txt --text wiki.txt code.txt

A row is a preset, a scheme or a YAML file, which is exported first, or LABEL=FOLDER, an export of MODEL. Columns are
the texts: mean KL from the float model and its standard error over windows, measured on the first windows of each with
the deployed files; the last line counts the pairs of rows that a text puts in the order of the first one.
"""

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.artifact import manifest as manifests
from qexport.cli.console import showing_progress
from qexport.formatting import megabytes
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.report import Logits
from qexport.validation.text import choose_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", nargs="+", help="recipes, and LABEL=FOLDER")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text; by default what each recipe says")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 texts to measure on")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--folder", type=Path, help="where exports are kept, and taken from if they are there")
    parser.add_argument("--threads", type=int, help="of an ONNX Runtime operator")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="qexport-") as scratch:
        folders = exported(given, given.folder or Path(scratch))
        scores = [measured(given, text, folders) for text in given.text]
    print_row(["export", "files", *(path.stem for path in given.text), "top-1, " + given.text[0].stem])
    print_row(["---"] * (len(given.text) + 3))
    for label, folder in folders.items():
        size = megabytes(manifests.load_any(folder).bytes["model"])
        kl = [f"{of[label].kl_mean:.4f} ± {of[label].kl_error or 0:.4f}" for of in scores]
        print_row([label, size, *kl, f"{100 * scores[0][label].top1_agreement:.1f} %"])
    perplexities = [f"{next(iter(of.values())).float_perplexity:.4g}" for of in scores]
    print_row(["float, perplexity", "", *perplexities, ""])
    print_row(["pairs in the order of the first", "", *(in_order(scores[0], of) for of in scores), ""])


def exported(given: argparse.Namespace, place: Path) -> dict[str, Path]:
    """The folder of every row, by its label."""
    folders = {}
    for row in given.rows:
        label, is_folder, folder = row.partition("=")
        folders[label] = Path(folder) if is_folder else place / Path(row).stem
        if not is_folder and not folders[label].exists():
            with showing_progress() as progress:
                export(given.model, row, out_dir=folders[label], calibration=given.calibration, progress=progress)
    return folders


def measured(given: argparse.Namespace, text: Path, folders: dict[str, Path]) -> dict[str, Logits]:
    """Scores of every row on a text."""
    captured = capture_model(given.model)
    windows = choose_text(captured, text, given.windows, given.window, lambda *_: None).windows
    reference = FloatOutputs(captured, decoder_feeds(captured, windows), ("logits",))
    found = {}
    for label, folder in folders.items():
        run = deployed_logits(folder, manifests.load_any(folder), given.window, threads=given.threads)
        found[label] = compare_logits(reference, windows, run)
        del run  # closes the session before the next one opens
    reference.close()
    return found


def in_order(first: dict[str, Logits], other: dict[str, Logits]) -> str:
    """Of the pairs of rows, how many are in the same order of KL."""
    pairs = list(combinations(first, 2))
    alike = sum((first[a].kl_mean < first[b].kl_mean) == (other[a].kl_mean < other[b].kl_mean) for a, b in pairs)
    return f"{alike} of {len(pairs)}"


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
