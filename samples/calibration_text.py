"""What the choice of the calibration text costs in KL, as a Markdown table.

    python samples/calibration_text.py MODEL --text wikitext-2-valid.txt [--recipes w4a16_g32 w8a8_static]

MODEL is a Hugging Face id or a folder. The first half of the text's lines calibrates, windows of the second half are
measured. The other sources: text of another kind (source code of Python's standard library), text that the model
writes, random tokens; all of as many sequences of as many tokens. The same text as a file of token ids, and packed, are
rows to show that they say the same. Every row is the deployed file.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.cli.console import showing_progress
from qexport.recipe.recipe import Recipe
from qexport.validation.formatting import number, with_error
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.text import choose_text

HEADER = ["recipe", "calibrated on", "perplexity", "KL", "top-1"]
MODULES = ("argparse", "datetime", "decimal", "doctest", "inspect", "pickle", "statistics", "tarfile", "typing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text: half of it calibrates, half is measured")
    parser.add_argument("--recipes", nargs="+", default=["w4a16_g32", "w8a8_static"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sources", nargs="+", help="only these rows")
    given = parser.parse_args()

    captured = capture_model(given.model)
    tokenizer = captured.folder.tokenizer()
    with tempfile.TemporaryDirectory(prefix="qexport-") as place, showing_progress() as progress:
        sources = texts(Path(place), given.text, tokenizer)
        text = choose_text(captured, Path(place) / "second.txt", given.windows, given.window, lambda *_: None)
        reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
        print(f"{captured.folder.name}: {text.described}\n")
        print_row(HEADER)
        print_row(["---"] * len(HEADER))
        for name in given.recipes:
            for described, source in sources.items():
                if given.sources and described not in given.sources:
                    continue
                recipe = Recipe.load(name).with_calibration(
                    source=str(source), samples=given.samples, sequence_length=given.sequence_length,
                    packed="packed" in described,
                )  # fmt: skip
                out = Path(place) / "out"
                made = export(given.model, recipe, out_dir=out, overwrite=True, progress=progress)
                run = deployed_logits(out, made.manifest, given.window)
                scores = compare_logits(reference, text.windows, run)
                del run  # closes the session before the file is replaced
                print_row([
                    name, described, number(scores.perplexity), with_error(scores.kl_mean, scores.kl_error),
                    f"{100 * scores.top1_agreement:.1f} %",
                ])  # fmt: skip


def texts(place: Path, text: Path, tokenizer) -> dict[str, str | Path]:
    """By what they are, the sources to calibrate on."""
    lines = text.read_text("utf-8").splitlines(keepends=True)
    first, second = "".join(lines[: len(lines) // 2]), "".join(lines[len(lines) // 2 :])
    library = Path(sysconfig.get_path("stdlib"))
    code = "\n".join((library / f"{name}.py").read_text("utf-8") for name in MODULES)
    for name, content in (("first", first), ("second", second), ("code", code)):
        (place / f"{name}.txt").write_text(content, "utf-8")
    np.save(place / "first.npy", np.asarray(tokenizer(first, verbose=False)["input_ids"], dtype=np.int32))
    return {
        "text of the same kind": place / "first.txt",
        "the same text as token ids": place / "first.npy",
        "the same text, packed": place / "first.txt",
        "source code": place / "code.txt",
        "text that the model writes": "self",
        "random tokens": "random",
    }


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
