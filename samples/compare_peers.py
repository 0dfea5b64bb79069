"""qexport next to onnxruntime-genai's model builder on one model: size, accuracy and speed, as a Markdown table.

    python samples/compare_peers.py MODEL --text test.txt --calibration train.txt --recipes w4a16_g32 w4a16_g32_rtn

MODEL is a local folder. Every recipe (a preset, a scheme or a YAML file) is exported, and the builder runs with each of
the settings in BUILDER below, for the CPU, all from the same checkpoint; --rows takes only some of them. The deployed
files are compared with the float model on the first windows of the text, and then measured by one runner in turns.
Load, prefill and decode are counted in those of the builder's default: above 1 is faster for prefill and decode, slower
for load. Memory is the largest growth of the process that runs the file.

The builder runs in an environment of its own: that of --builder, or a temporary one that also sees the packages of this
one. "export, s" is the time of a whole process, imports included.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from fnmatch import fnmatchcase
from pathlib import Path

from qexport.api.stages.capturing import capture_model
from qexport.artifact import manifest as manifests
from qexport.cli.console import showing_progress
from qexport.recipe.recipe import Recipe
from qexport.runtime.benchmark import Measurement, measure, ratios
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.report import Logits
from qexport.validation.text import choose_text

PACKAGE = "onnxruntime-genai-cuda>=0.18"  # its builder writes files for the CPU as well
DEFAULT = "builder int4"
BUILDER = {  # extra options of the builder; its default is blocks of 32, accuracy level 4
    DEFAULT: [],
    "builder int4, block 128": ["block_size=128"],
    "builder int4, zero points": ["is_symmetric=false"],
    "builder int4, k-quant": ["algo_config=k_quant"],
    "builder int4, k-quant, int8 head": ["algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"],
    "builder int4, k-quant mixed": [
        "algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"
    ],
    "builder int4, float embedding": ["shared_embeddings=false"],
}  # fmt: skip
HEADER = ["row", "files, MB", "perplexity", "KL", "top-1", "export, s", "memory, MB", "load"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipes", nargs="+", default=["balanced"], help="names or YAML files")
    parser.add_argument("--rows", nargs="+", default=["*"], help="shell patterns of the rows to measure")
    parser.add_argument("--builder", help="interpreter of an environment in which the builder works")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text; by default what each recipe says")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of everything; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of an ONNX Runtime operator")
    given = parser.parse_args()

    for name in given.recipes:
        Recipe.load(name)  # a misspelt one fails now, not in an hour
    rows = [*given.recipes, *BUILDER]
    wanted = [name for name in rows if name == DEFAULT or any(fnmatchcase(name, p) for p in given.rows)]
    with tempfile.TemporaryDirectory(prefix="qexport-") as place, showing_progress() as progress:
        builder = given.builder or _environment(Path(place) / "environment")
        captured = capture_model(given.model)
        text = choose_text(captured, given.text, given.windows, given.window, lambda *_: None)
        reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
        folders, scores, seconds = {}, {}, {}
        for number, name in enumerate(wanted):
            progress("rows", name, number, len(wanted))
            out = folders[name] = Path(place) / f"row{number}"
            export = [sys.executable, "-m", "qexport", "export", given.model, "--recipe", name, "--out", out]
            export += ["--calibration", given.calibration] if given.calibration else []
            build = [builder, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", "-i", given.model]
            build += ["-o", out, "-c", Path(place) / "cache"]
            build += ["--extra_options", *BUILDER[name]] if BUILDER.get(name) else []
            seconds[name] = _run(build if name in BUILDER else export)
            run = deployed_logits(folders[name], manifests.load_any(folders[name]), given.window, threads=given.threads)
            scores[name] = compare_logits(reference, text.windows, run)
            del run  # closes the session before the next one opens
        progress("rows", "", len(wanted), len(wanted))
        found, notes = measure(list(folders.values()), repeats=given.repeats, threads=given.threads, progress=progress)
    speeds = dict(zip(wanted, found, strict=True))
    print(f"{captured.folder.name}: {text.described}; {given.threads} threads, medians of {given.repeats}\n")
    _print_table(speeds, scores, seconds)
    print("\n" + "\n".join([_absolute(speeds[DEFAULT]), *notes]))


def _environment(folder: Path) -> str:
    """An interpreter that sees the packages of this one, and the builder without the packages it would bring along."""
    venv.create(folder, with_pip=True)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    own = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (Path(packages) / "beside.pth").write_text("\n".join(sorted(own)) + "\n")
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    _run([python, "-m", "pip", "install", "--quiet", "--no-deps", PACKAGE])
    return python


def _run(command: list) -> float:
    """Seconds of a process that has to succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return time.perf_counter() - started


def _print_table(speeds: dict[str, Measurement], scores: dict[str, Logits], seconds: dict[str, float]) -> None:
    base = speeds[DEFAULT]
    columns = [*(f"prefill {n}" for n in base.prefill), *(f"decode {n}" for n in base.decode)]
    print("| " + " | ".join([*HEADER, *columns]) + " |")
    print("| " + " | ".join(["---"] * (len(HEADER) + len(columns))) + " |")
    perplexity = next(iter(scores.values())).float_perplexity
    print(f"| float32 |  | {perplexity:.4g} | 0 | 100 % |" + "  |" * (len(HEADER) + len(columns) - 5))
    for name, speed in speeds.items():
        score, ratio = scores[name], ratios(speed, base)
        cells = [
            name, f"{speed.model_bytes / 1e6:.1f}", f"{score.perplexity:.4g}", f"{score.kl_mean:.4g}",
            f"{100 * score.top1_agreement:.1f} %", f"{seconds[name]:.0f}", f"{speed.memory_bytes / 1e6:.0f}",
            *(f"{ratio[column.replace(' ', ':')]:.2f}" for column in ["load_seconds", *columns]),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def _absolute(speed: Measurement) -> str:
    """What 1 stands for, and how far the times of one repeat lie apart."""
    rates = [f"prefill {n} {rate:.0f} tokens/s" for n, rate in speed.prefill.items()]
    rates += [f"decode {n} {rate:.1f} tokens/s" for n, rate in speed.decode.items()]
    widest = max(speed.spread.values())
    return f"{DEFAULT}: load {speed.load_seconds:.2f} s, {', '.join(rates)}; interquartile ranges up to {widest:.0%}"


if __name__ == "__main__":
    main()
