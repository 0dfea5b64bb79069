"""Which families of decoders can be exported, and what becomes of them: a table from a small random model of each.

    python samples/families.py [--families 'gemma*' bloom] [-o samples/results/families.md]

The models are in families.yaml beside this file. Each is captured and compared with transformers, exported for the CPU
with three schemes and compared with its graph in ONNX Runtime, and exported for CUDA and placed there without a GPU:
with the helpers of the tests, so this runs in a checkout of the project.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import agreement  # noqa: E402
from cuda_placement.build import CannotBuild, build_stand_ins  # noqa: E402
from cuda_placement.models import CPU, PROMPT  # noqa: E402
from cuda_placement.probe import PlacementError, placement  # noqa: E402
from models import BREADTH, FAMILIES, REFUSED, reference_model, save_model  # noqa: E402
from qexport.capture.graph import Captured  # noqa: E402
from qexport.errors import QExportError  # noqa: E402
from qexport.export import capture  # noqa: E402
from qexport.lower.build import check_translations  # noqa: E402
from qexport.recipe import CalibrationSpec, Recipe  # noqa: E402
from stepping import captured_runner, load_weights, padded, transformers_runner  # noqa: E402

SCHEMES = {"w4a16": "w4a16_g32", "w8a8 per token": "w8a8_dyn", "w8a8 static": "w8a8_static"}
MASKS = (padded([9, 4, 6], "left"), padded([7, 2, 5], "right"))
HEADER = ["family", "from transformers", "attention", "quantized", "left in float", *SCHEMES, "CUDA"]
HEAD = """# Families of decoders

    python samples/families.py -o samples/results/families.md

Small random models (`samples/families.yaml`), qexport {qexport}, torch {torch}, transformers {transformers},
ONNX Runtime {onnxruntime}.

- *From transformers*: the largest difference of a logit between the captured float model and transformers' eager one,
  of the largest logit, over prompts padded on the left and on the right and {steps} steps with the cache.
- *Attention*: grouped is GroupQueryAttention, standard is ONNX Attention or attention written out, and why.
- *Quantized*: linears, the output projection among them; then those that stay float, and why.
- By scheme, rounded to nearest, for the CPU: the largest difference of what a block makes in ONNX Runtime and in its fx
  graph, of its largest element, over a prompt and {steps} steps. Where that is above {rounding:g}, the share of tokens
  that are: an activation on the border of two codes gets one here and the other there.
- *CUDA*: the w4a16 file placed by ONNX Runtime on stand-in CUDA libraries, which computes nothing. Nodes on the CPU are
  arithmetic of lengths; a copy between CPU and GPU would be named.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["*"], help="shell patterns of the families to try")
    parser.add_argument("-o", "--output", type=Path, help="write the table to this file, and not to stdout")
    given = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [n for n in (*FAMILIES, *BREADTH, *REFUSED) if any(fnmatchcase(n, p) for p in given.families)]
    rows, refusals = [], []
    with tempfile.TemporaryDirectory(prefix="qexport-") as place:
        stand_ins = _stand_ins(Path(place))
        for name in chosen:
            print(name, file=sys.stderr)
            try:
                rows.append([name, *measured(name, Path(place) / name, stand_ins)])
            except (QExportError, ValueError) as error:
                refusals.append(f"- `{name}`: {_one_line(error, place)}")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, onnxruntime)}
    head = HEAD.format(
        qexport=version("qexport"), **versions, steps=agreement.STEPS, rounding=agreement.ROUNDING
    )  # fmt: skip
    lines = [head, _line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)]
    if refusals:
        lines += ["", "## Not supported", "", *refusals]
    text = "\n".join(lines) + "\n"
    if given.output:
        given.output.write_text(text)
    else:
        print(text, end="")


def measured(name: str, folder: Path, stand_ins: dict[str, str] | None) -> list[str]:
    """The cells of a family's row.

    Raises:
        QExportError, ValueError: it is not supported; ValueError is transformers'.
    """
    captured = capture(save_model(name, folder / "model"))
    check_translations(block.module.graph for block in captured.blocks)
    error = from_transformers(captured, reference_model(folder / "model"))
    exports = {
        title: agreement.export(copy.deepcopy(captured), _recipe(scheme), "cpu", folder / scheme)
        for title, scheme in SCHEMES.items()
    }
    first = next(iter(exports.values()))
    kept = json.loads((first.folder / "report.json").read_text())["export"]["float"]
    reasons = Counter(entry["reason"] for entry in kept)
    settings = first.manifest.settings
    why = settings.get("attention_reason", "")
    return [
        f"{error:.0e}",
        settings["attention"] + (f": {why}" if why else ""),
        str(len(first.manifest.linears)),
        "; ".join(f"{number} ({reason})" for reason, number in reasons.items()) or "none",
        *(_agreement(exported) for exported in exports.values()),
        on_cuda(captured, folder / "cuda", stand_ins),
    ]


def from_transformers(captured: Captured, model: torch.nn.Module) -> float:
    """The largest difference of a logit, of the largest logit."""
    loaded, worst = load_weights(copy.deepcopy(captured)), 0.0
    for mask in MASKS:
        runs = (captured_runner(loaded), transformers_runner(model))
        got, want = agreement.logits(mask, *((run, captured, torch.float32) for run in runs))
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return worst


def on_cuda(captured: Captured, folder: Path, stand_ins: dict[str, str] | None) -> str:
    """Where the nodes of the file for CUDA are placed."""
    if stand_ins is None:
        return "not tried"
    exported = agreement.export(copy.deepcopy(captured), _recipe(SCHEMES["w4a16"]), "cuda", folder)
    try:
        placed = placement(exported.folder / "model.onnx", exported.manifest.session, stand_ins, PROMPT)
    except PlacementError as error:
        return _one_line(error, "")
    away = sum(placed["nodes"].get(CPU, {}).values())
    return f"{away} on the CPU" + (f", {placed['memcpy']} copies" if placed["memcpy"] else "")


def _agreement(exported) -> str:
    different = agreement.differences(exported, MASKS[0])
    flips = float((different > agreement.ROUNDING).float().mean())
    return f"{float(different.max()):.0e}" + (f", {flips:.1%}" if flips else "")


def _recipe(scheme: str) -> Recipe:
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    return Recipe(scheme=scheme, lm_head=scheme, weights={"method": "rtn"}, calibration=calibration)


def _stand_ins(place: Path) -> dict[str, str] | None:
    try:
        (place / "stand_ins").mkdir()
        return build_stand_ins(place / "stand_ins")
    except CannotBuild:
        return None


def _one_line(error: Exception, place: str) -> str:
    text = " ".join(str(error).split())
    return text.replace(f"{place}/", "").removesuffix(". See `qexport doctor`")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
