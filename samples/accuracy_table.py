"""Accuracy of several recipes on one model, as a Markdown table.

    python samples/accuracy_table.py MODEL --calibration train.txt --text test.txt --recipes w4a16_g32_rtn w8a8_dyn

MODEL is a Hugging Face id or a folder. Every recipe is exported to a temporary folder, and the deployed file is
compared with the float model on the first windows of the text, which should not be the calibration text. The float
model runs once for all recipes (its seconds are in brackets). Embedding and output projection are in float unless the
recipe says otherwise. With --float16 the float model in float16 is a row too. What follows ± is a standard error over
windows.

The limits of qexport/validation/quality.py come from

    python samples/accuracy_table.py SmolLM2-135M --text wikitext-2-valid.txt --windows 8 --window 512 --float16 \
        --recipes w8a16 w8a8_dyn w8a8_static compact w4a16_g128 w4a16_g32 nf4 w4a16_g64_hqq w4a16_g64_awq \
        w4a16_g32_rtn w4a16_g128_rtn w3a16_g64 w2a16_g64
"""

import argparse
import tempfile
import time
from pathlib import Path

from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.recipe.recipe import Recipe
from qexport.validation.float_forms import half_logits
from qexport.validation.formatting import number, with_error
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.report import HALF, Logits
from qexport.validation.text import choose_text

HEADER = ["recipe", "linears, bytes", "relative perplexity", "KL mean", "KL 99 %", "top-1", "export, s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text; by default what each recipe says")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--recipes", nargs="+", required=True, help="presets, schemes or YAML files")
    parser.add_argument("--float16", action="store_true", help="a row for the float model in float16 in PyTorch")
    parser.add_argument("--threads", type=int, help="of an ONNX Runtime operator")
    given = parser.parse_args()

    recipes = {name: Recipe.load(name) for name in given.recipes}  # a misspelt one fails now, not in an hour
    captured = capture_model(given.model)
    text = choose_text(captured, given.text, given.windows, given.window, lambda what, done, total: None)
    started = time.perf_counter()
    reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
    seconds = time.perf_counter() - started

    print(f"{captured.folder.name}: {text.described}\n")
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    print_row(["float32", "", "1", "0", "0", "100 %", f"({seconds:.0f})"])
    if given.float16:
        with half_logits(captured, text.windows) as run:
            print_row([HALF, "", *measures(compare_logits(reference, text.windows, run)), ""])
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
            result = export(given.model, recipe, out_dir=Path(folder) / "out", calibration=given.calibration)
            run = deployed_logits(result.folder, result.manifest, given.window, threads=given.threads)
            scores = compare_logits(reference, text.windows, run)
            del run  # closes the session before the folder goes
        size = sum(entry.bytes for entry in result.manifest.linears)
        size += sum(e.bytes for e in result.embeddings if e.linear)  # codes that the output projection reads
        print_row([name, f"{size:,}", *measures(scores), f"{sum(result.seconds.values()):.0f}"])


def measures(scores: Logits) -> list[str]:
    return [
        with_error(scores.relative_perplexity, scores.relative_perplexity_error),
        with_error(scores.kl_mean, scores.kl_error), number(scores.kl_p99),
        f"{100 * scores.top1_agreement:.1f} % ± {100 * (scores.top1_error or 0):.1f}",
    ]  # fmt: skip


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
