"""Which families of models can be exported, and what becomes of them: tables from a small random model of each.

    python samples/families.py [--kinds decoders ... heads] [--families 'gemma*' bert] [-o FILE]

The models are in families.yaml beside this file. Each is captured and compared with transformers, exported for the CPU
with three schemes and compared with its graph in ONNX Runtime, and exported for CUDA and placed there without a GPU:
with the helpers of the tests, so this runs in a checkout of the project.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path

import qexport  # noqa: F401  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import agreement, random_modules  # noqa: E402
from helpers.cuda_placement.build import CannotBuild, build_stand_ins  # noqa: E402
from helpers.cuda_placement.models import CPU, PROMPT  # noqa: E402
from helpers.cuda_placement.probe import PlacementError, placement  # noqa: E402
from helpers.random_decoders import BREADTH, FAMILIES, LISTS, REFUSED, reference_model, save_model  # noqa: E402
from helpers.runners import (  # noqa: E402
    captured_runner,
    load_weights,
    padded,
    source_of,
    stepwise,
    tokens,
    transformers_runner,
)
from qexport.api.stages.capturing import capture_model  # noqa: E402
from qexport.artifact.manifest import QMOE  # noqa: E402
from qexport.calibrate.encoder_inputs import encoder_batch  # noqa: E402
from qexport.capture.graph import CapturedModel  # noqa: E402
from qexport.capture.module import capture_module  # noqa: E402
from qexport.capture.seq2seq import capture_seq2seq  # noqa: E402
from qexport.errors import QExportError  # noqa: E402
from qexport.graph.convolution_sites import convolutions
from qexport.lower.check import check_translations  # noqa: E402
from qexport.models.keypoints import with_maps  # noqa: E402
from qexport.models.source import open_model  # noqa: E402
from qexport.recipe.recipe import CalibrationSpec, Recipe  # noqa: E402

SCHEMES = {"w4a16": "w4a16_g32", "w8a8 per token": "w8a8_dyn", "w8a8 static": "w8a8_static"}
# What computes with lengths.
LENGTHS = {"Add", "Cast", "Concat", "Div", "Gather", "Max", "Mul", "Neg", "Range", "Squeeze", "Sub", "Unsqueeze"}
MASKS = (padded([9, 4, 6], "left"), padded([7, 2, 5], "right"))
KINDS = {
    "decoders": (*FAMILIES, *BREADTH, *REFUSED), "encoder-decoders": random_modules.SEQ2SEQ,
    "encoders": random_modules.ENCODERS, "modules": random_modules.MODULES, "heads": random_modules.HEADS,
}  # fmt: skip
HEAD = """# Families of models

    python samples/families.py -o samples/results/families.md

Small random models (`samples/families.yaml`), qexport {qexport}, torch {torch}, transformers {transformers},
ONNX Runtime {onnxruntime}.

- *From transformers*: the largest difference of an output between the captured float model and transformers' eager one,
  of the largest element of that output: of decoders the logits, over prompts padded on the left and on the right and
  {steps} steps with the cache; of encoder-decoders the same, over a prompt and {steps} steps; of encoders over padded
  texts; of modules over two calls of different sizes.
- *Quantized*: linears, the output projection of decoders among them, of encoder-decoders in both files; then those
  that stay float, and why.
- By scheme, rounded to nearest, for the CPU: the largest difference of what a block makes in ONNX Runtime and in its fx
  graph, of its largest element; of decoders over a prompt and {steps} steps. Where that is above {rounding:g}, the
  share of tokens (of modules, of rows) that are: a value on the border of two codes gets one here and the other there.
- *CUDA*: the w4a16 file placed by ONNX Runtime on stand-in CUDA libraries, which computes nothing. Nodes on the CPU are
  arithmetic of lengths; copies between CPU and GPU are named with the operators that have no CUDA kernel.
"""
SECTIONS = {
    "decoders": """Prefill and steps through a cache. *Attention*: grouped is GroupQueryAttention, standard is ONNX
Attention or attention written out, and why. *Experts*: with w4a16, QMoE computes those that a token chose; or why every
token takes all of them.""",
    "encoder-decoders": """Two files: the encoder with the keys and values that the decoder reads of its source, and the
decoder with a cache. The worse of both is shown; on CUDA, the encoder first.""",
    "encoders": "From their folders, without a head.",
    "modules": """As `nn.Module` with example inputs. *Convolutions*: quantized with w8a8_static on the CPU, of all.
Other schemes have no convolution and CUDA has no integer one, so that they stay float there. Networks that are no row
of layers are one block, in which a code that differs changes what follows.""",
    "heads": """From their folders, with the head that `architectures` names: outputs and their dimensions, *decides* is
what `validate` reads off them. What makes logits takes the same scheme here (`lm_head`); otherwise it is float.""",
}
COLUMNS = {
    "decoders": ("attention", "experts", "quantized"), "encoder-decoders": ("quantized",), "encoders": ("quantized",),
    "modules": ("quantized", "convolutions"), "heads": ("outputs", "decides", "quantized", "convolutions"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--families", nargs="+", default=["*"], help="shell patterns of the families to try")
    parser.add_argument("-o", "--output", type=Path, help="write the tables to this file, and not to stdout")
    given = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, onnxruntime)}
    lines = [HEAD.format(
        qexport=version("qexport"), **versions, steps=agreement.STEPS, rounding=agreement.ROUNDING
    )]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qexport-") as place:
        stand_ins = _stand_ins(Path(place))
        for kind in given.kinds:
            chosen = [n for n in KINDS[kind] if any(fnmatchcase(n, p) for p in given.families)]
            lines += section(kind, chosen, Path(place), stand_ins)
    text = "\n".join(lines) + "\n"
    if given.output:
        given.output.write_text(text)
    else:
        print(text, end="")


def section(kind: str, names: list[str], place: Path, stand_ins: dict[str, str] | None) -> Iterator[str]:
    """The lines of one kind of model: a table, and what is refused."""
    rows, refusals = [], []
    for name in names:
        print(name, file=sys.stderr)
        try:
            rows.append([name, *measured(kind, name, place / kind / name, stand_ins)])
        except (QExportError, ValueError) as error:
            refusals.append(f"- `{name}`: {_one_line(error, f'{place}/{kind}')}")
    header = ["family", "from transformers", *COLUMNS[kind], "left in float", *SCHEMES, "CUDA"]
    yield from (f"## {kind.capitalize()}\n", SECTIONS[kind], "")
    yield from (_line(header), _line(["---"] * len(header)), *map(_line, rows), "")
    if refusals:
        yield from ("Not supported:", "", *refusals, "")


def measured(kind: str, name: str, folder: Path, stand_ins: dict[str, str] | None) -> list[str]:
    """The cells of a family's row.

    Raises:
        QExportError, ValueError: it is not supported; ValueError is transformers'.
    """
    if kind == "encoder-decoders":
        return measured_pair(name, folder, stand_ins)
    capture = {"decoders": _decoder, "encoders": _encoder, "modules": _module, "heads": _head}[kind]
    captured, error, feeds = capture(name, folder)
    options = {"calibration": [feeds]} if captured.kind == "module" else {}
    exports = {
        title: agreement.export(copy.deepcopy(captured), _recipe(scheme), "cpu", folder / scheme, **options)
        for title, scheme in SCHEMES.items()
    }
    differences = partial(agreement.differences, mask=MASKS[0])
    if kind != "decoders":
        differences = partial(agreement.module_differences, feeds=feeds)
    static = exports["w8a8 static"]  # the one that has convolutions
    report, manifest = json.loads((static.folder / "report.json").read_text())["export"], static.manifest
    reasons = Counter(entry["reason"] for entry in report["float"])
    quantized = len(manifest.linears), f"{len(manifest.convolutions)} of {_count(captured)}"
    why = manifest.settings.get("attention_reason", "")
    cells = {
        "attention": manifest.settings.get("attention", "") + (f": {why}" if why else ""),
        "outputs": ", ".join(f"{port.name} {list(port.dims)}".replace("'", "") for port in captured.outputs),
        "decides": captured.settings.get("decides", "") or "numbers",
        "experts": _experts(exports["w4a16"]), "quantized": str(quantized[0]), "convolutions": quantized[1],
    }  # fmt: skip
    return [
        f"{error:.0e}",
        *(cells[column] for column in COLUMNS[kind]),
        "; ".join(f"{number} ({reason})" for reason, number in reasons.items()) or "none",
        *(_agreement(differences, exported) for exported in exports.values()),
        on_cuda(captured, folder / "cuda", stand_ins, options),
    ]


def measured_pair(name: str, folder: Path, stand_ins: dict[str, str] | None) -> list[str]:
    """The cells of an encoder-decoder's row; raises as `measured`."""
    parts = capture_seq2seq(open_model(random_modules.save_seq2seq(name, folder / "model")))
    captured = {"encoder": _checked(parts.encoder), "decoder": _checked(parts.decoder)}
    source, text = source_of(parts.encoder, MASKS[1]), tokens(len(MASKS[1]), 3 + agreement.STEPS, 5)
    float_encoder, float_decoder = (captured_runner(load_weights(copy.deepcopy(c))) for c in captured.values())
    got, calls = stepwise(float_encoder, float_decoder, parts.decoder, source, text)
    with torch.no_grad():
        want = parts.model(**source, decoder_input_ids=text).logits
    feeds = {"encoder": [source], "decoder": [fed for fed, _ in calls]}
    cells, reasons, quantized = [], Counter(), 0
    for title, scheme in SCHEMES.items():
        different = []
        for part, whole in captured.items():
            exported = agreement.export(
                copy.deepcopy(whole), _recipe(scheme), "cpu", folder / title / part, calibration=feeds[part][:1]
            )
            different += [agreement.module_differences(exported, fed) for fed in feeds[part]]
            if title == "w8a8 static":
                report = json.loads((exported.folder / "report.json").read_text())["export"]
                reasons.update(entry["reason"] for entry in report["float"])
                quantized += len(exported.manifest.linears)
        cells.append(_agreement(lambda found: torch.cat(found), different))
    placed = [on_cuda(whole, folder / "cuda" / part, stand_ins, {}) for part, whole in captured.items()]
    return [
        f"{float((got - want).abs().max() / want.abs().max()):.0e}",
        str(quantized),
        "; ".join(f"{number} ({reason})" for reason, number in reasons.items()) or "none",
        *cells,
        placed[0] if placed[0] == placed[1] else " and ".join(placed),
    ]


def _decoder(name: str, folder: Path) -> tuple[CapturedModel, float, None]:
    """The captured model, and the largest difference of a logit, of the largest logit."""
    captured = _checked(capture_model(save_model(name, folder / "model")))
    loaded, model, worst = load_weights(copy.deepcopy(captured)), reference_model(folder / "model"), 0.0
    for mask in MASKS:
        runs = (captured_runner(loaded), transformers_runner(model))
        got, want = agreement.logits(mask, *((run, captured, torch.float32) for run in runs))
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return captured, worst, None


def _encoder(name: str, folder: Path) -> tuple[CapturedModel, float, dict]:
    """The captured model, the largest difference of an output, and inputs."""
    random_modules.save_encoder(name, folder / "model")
    captured = _checked(capture_model(folder / "model"))
    model = transformers.AutoModel.from_pretrained(folder / "model", attn_implementation="eager").eval()
    feeds = [encoder_batch(captured, tokens(*mask.shape), mask) for mask in MASKS]
    return captured, _from_eager(captured, model, feeds), feeds[0]


def _module(name: str, folder: Path) -> tuple[CapturedModel, float, dict]:
    model, feeds = random_modules.make_module(name), [random_modules.example_inputs(name, more) for more in (0, 1)]
    captured = _checked(capture_module(model, feeds[0], random_modules.axes(name)))
    return captured, _from_eager(captured, model, feeds), feeds[0]


def _head(name: str, folder: Path) -> tuple[CapturedModel, float, dict]:
    saved = random_modules.save_head(name, folder / "model")
    captured = _checked(capture_model(saved))
    model = getattr(transformers, LISTS["heads"][name]["head"]).from_pretrained(saved, attn_implementation="eager")
    model = with_maps(model) if captured.settings.get("task") == "keypoint-detection" else model
    feeds = random_modules.head_inputs(captured)
    return captured, _from_eager(captured, model.eval(), feeds), feeds[0]


def _from_eager(captured: CapturedModel, model: torch.nn.Module, feeds: list[dict]) -> float:
    run, worst = captured_runner(load_weights(copy.deepcopy(captured))), 0.0
    for fed in feeds:
        with torch.no_grad():
            made, got = model(**fed), run(fed)
        real = fed["attention_mask"].bool() if captured.kind == "encoder" and "attention_mask" in fed else None
        for name, value in got.items():
            want = random_modules.looked_up(made, name)
            if real is not None and value.shape[:2] == real.shape:
                value, want = value[real], want[real]
            worst = max(worst, float((value - want).abs().max() / want.abs().max()))
    return worst


def _experts(exported) -> str:
    """How the mixtures of a file are computed; empty where it has none."""
    report = json.loads((exported.folder / "report.json").read_text())["export"]
    reasons = dict.fromkeys(f"all: {entry['reason']}" for entry in report["dense"])
    return "; ".join(["QMoE"] * any(entry.kernel == QMOE for entry in exported.manifest.linears) + list(reasons))


def _count(captured: CapturedModel) -> int:
    """How many convolutions a model has."""
    return sum(len(convolutions(block.module.graph)) for block in captured.blocks)


def _checked(captured: CapturedModel) -> CapturedModel:
    check_translations(block.module.graph for block in captured.blocks)
    return captured


def on_cuda(captured: CapturedModel, folder: Path, stand_ins: dict[str, str] | None, options: dict) -> str:
    """Where the nodes of the file for CUDA are placed."""
    if stand_ins is None:
        return "not tried"
    exported = agreement.export(copy.deepcopy(captured), _recipe(SCHEMES["w4a16"]), "cuda", folder, **options)
    # With a convolution sizes stay free: the stand-in of cuDNN does not say them.
    dims = None if _count(captured) else PROMPT | random_modules.SIZES | {"encoder_sequence_length": 7}
    try:
        placed = placement(exported.folder / "model.onnx", exported.manifest.session, stand_ins, dims)
    except PlacementError as error:
        return _one_line(error, "")
    away = placed["nodes"].get(CPU, {})
    others = ", ".join(sorted(away.keys() - LENGTHS))
    copies = f", {placed['memcpy']} copies around {others or 'lengths'}" if placed["memcpy"] else ""
    return f"{sum(away.values())} on the CPU{copies}"


def _agreement(differences: Callable, exported) -> str:
    different = differences(exported)
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
    text = re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))
    return (text.replace(f"{place}/", "") if place else text[-300:]).removesuffix(". See `qexport doctor`")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
