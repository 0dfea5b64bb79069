"""Every method on one model: size, accuracy, quantization kernel and speed, as a Markdown table.

    python samples/methods_table.py MODEL --calibration train.txt --text test.txt [--rows '*LoRC*' '*nf4*']

MODEL is a Hugging Face id or a folder. The rows are in methods.yaml beside this file. Each is exported for the CPU to a
temporary folder and its file measured: against the float model on the first windows of the text, and for speed in turns
with a float32 file of the same model, whose tokens/s the last two columns count as 1. Embedding and output projection
are float. The kernel is the mean share, over the places where activations are quantized, of those that become zero.
"""

import argparse
import json
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean

import yaml

from qexport import bench
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.cli.console import showing_progress
from qexport.recipe.recipe import Override, Recipe
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.report_store import REPORT_FILE
from qexport.validation.text import choose_text

ROWS = Path(__file__).with_name("methods.yaml")
HEADER = ["method", "linears, MB", "perplexity", "KL", "top-1", "kernel", "prefill", "decode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text; by default the model writes its own")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of 256 tokens")
    parser.add_argument("--rows", nargs="+", default=["*"], help="shell patterns of the rows to measure")
    parser.add_argument("--threads", type=int, default=1, help="of an ONNX Runtime operator")
    parser.add_argument("--no-speed", action="store_true", help="leave the last two columns empty")
    given = parser.parse_args()

    rows = {name: r for name, r in recipes(given.samples).items() if any(fnmatchcase(name, p) for p in given.rows)}
    with tempfile.TemporaryDirectory(prefix="qexport-") as place, showing_progress() as progress:
        captured = capture_model(given.model)
        text = choose_text(captured, given.text, given.windows, given.window, lambda *_: None)
        reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
        plain = Recipe(scheme="w8a8_dyn", overrides=(Override(match="*", scheme="float"),))
        if not given.no_speed:
            export(given.model, plain, out_dir=Path(place) / "float", progress=progress)
        first = True
        for name, recipe in rows.items():
            out = Path(place) / "out"
            result = export(
                given.model, recipe, out_dir=out, calibration=given.calibration, overwrite=True, progress=progress
            )
            run = deployed_logits(out, result.manifest, given.window, threads=given.threads)
            scores = compare_logits(reference, text.windows, run)
            del run  # closes the session before the file is replaced
            speed = [] if given.no_speed else speeds(out, out.with_name("float"), given.threads)
            if first:  # its float perplexity is found beside the first row's
                print(f"{captured.folder.name}: {text.described}\n")
                print_row(HEADER)
                print_row(["---"] * len(HEADER))
                size = 4 * sum(n * k for n, k in (entry.shape for entry in result.manifest.linears)) / 1e6
                print_row(["float32", f"{size:.1f}", f"{scores.float_perplexity:.4g}", "0", "100 %", "", "1", "1"])
                first = False
            print_row([
                name, f"{sum(entry.bytes for entry in result.manifest.linears) / 1e6:.1f}", f"{scores.perplexity:.4g}",
                f"{scores.kl_mean:.4g}", f"{100 * scores.top1_agreement:.1f} %", kernel(out), *(speed or ["", ""]),
            ])  # fmt: skip


def recipes(samples: int) -> dict[str, Recipe]:
    """All rows; a misspelt key fails now, not in an hour."""
    found = {}
    for name, what in yaml.safe_load(ROWS.read_text("utf-8")).items():
        recipe = Recipe.load(what) if isinstance(what, str) else Recipe(name=name, **what)
        found[name] = recipe.with_calibration(samples=samples)
    return found


def speeds(folder: Path, against: Path, threads: int) -> list[str]:
    """Tokens/s of prefill and decode over those of another export."""
    found = bench(folder, against, prompt_lengths=[128], decode_pasts=[128], repeats=3, threads=threads)
    return [f"{found.ratios[name]:.2f}" for name in ("prefill:128", "decode:128")]


def kernel(folder: Path) -> str:
    """The mean share of activations that become zero, over all places where they are quantized."""
    blocks = json.loads((folder / REPORT_FILE).read_text("utf-8"))["export"]["blocks"]
    notes = [data for block in blocks for _, _, data in block["changed"].get("QuantizeActivations", ())]
    return f"{100 * mean(data['kernel'] for data in notes):.2f} %" if notes and "kernel" in notes[0] else ""


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
