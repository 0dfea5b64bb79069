"""Accuracy of several recipes on one model, as a Markdown table.

    python samples/accuracy_table.py MODEL --calibration train.txt --text test.txt --recipes w4a16_g32_rtn w8a8_dyn

MODEL is a Hugging Face id or a folder. Every recipe is exported to a temporary folder, and the deployed file is
compared with the float model on the first windows of the text, which should not be the calibration text. The float
model runs once for all recipes (its seconds are in brackets). Embedding and output projection are in float unless the
recipe says otherwise.
"""

import argparse
import tempfile
import time
from pathlib import Path

from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.recipe.recipe import Recipe
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.text import choose_text

HEADER = ["recipe", "linears, bytes", "perplexity", "KL mean", "KL 99 %", "top-1", "export, s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text; by default what each recipe says")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--recipes", nargs="+", required=True, help="presets, schemes or YAML files")
    parser.add_argument("--threads", type=int, help="of an ONNX Runtime operator")
    given = parser.parse_args()

    recipes = {name: Recipe.load(name) for name in given.recipes}  # a misspelt one fails now, not in an hour
    captured = capture_model(given.model)
    text = choose_text(captured, given.text, given.windows, given.window, lambda what, done, total: None)
    started = time.perf_counter()
    reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
    seconds = time.perf_counter() - started

    # The float row comes first, and its perplexity is found beside the first recipe's.
    first = True
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
            result = export(given.model, recipe, out_dir=Path(folder) / "out", calibration=given.calibration)
            run = deployed_logits(result.folder, result.manifest, given.window, threads=given.threads)
            scores = compare_logits(reference, text.windows, run)
            del run  # closes the session before the folder goes
        if first:
            print(f"{captured.folder.name}: {text.described}, {scores.tokens} predicted tokens\n")
            print_row(HEADER)
            print_row(["---"] * len(HEADER))
            size = 4 * sum(n * k for n, k in (entry.shape for entry in result.manifest.linears))
            print_row(["float32", f"{size:,}", number(scores.float_perplexity), "0", "0", "100 %", f"({seconds:.0f})"])
            first = False
        size = sum(entry.bytes for entry in result.manifest.linears)
        size += sum(e.bytes for e in result.embeddings if e.linear)  # codes that the output projection reads
        print_row([
            name, f"{size:,}", number(scores.perplexity), number(scores.kl_mean),
            number(scores.kl_p99), f"{100 * scores.top1_agreement:.1f} %", f"{sum(result.seconds.values()):.0f}",
        ])  # fmt: skip


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
