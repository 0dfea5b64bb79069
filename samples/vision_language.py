"""Models of pictures and text in three files: how close each part, and all of them in a chain, are to transformers.

    python samples/vision_language.py [--kinds llava qwen2_5_vl ...] [-o samples/results/vision_language.md]

The models are small and random (samples/families.yaml), so this runs in a checkout of the project, with the helpers of
its tests. What a model with trained weights loses is what `qexport validate` measures.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import exports  # noqa: E402
from helpers.random_pictures import KINDS, save_pictures_model  # noqa: E402
from qexport.api.vision_language.sources import calibration_data, load_examples  # noqa: E402
from qexport.artifact.manifest import DECODER  # noqa: E402
from qexport.capture.vision_language import VisionParts, capture_vision_language  # noqa: E402
from qexport.models.source import open_model  # noqa: E402
from qexport.models.vision_language.prompts import random_prompt  # noqa: E402
from qexport.progress import no_stage_progress  # noqa: E402
from qexport.quant.metrics import sqnr_db  # noqa: E402
from qexport.recipe.recipe import CalibrationSpec, Recipe  # noqa: E402
from qexport.runtime.vision_language import open_vision_language  # noqa: E402
from qexport.validation.reader import check_reader  # noqa: E402

SCHEMES = ("w4a16_g32", "w8a8_dyn", "w8a8_static")
HEAD = """# Models of pictures and text

    python samples/vision_language.py -o samples/results/vision_language.md

Small random models (`samples/families.yaml`), qexport {qexport}, torch {torch}, transformers {transformers},
ONNX Runtime {onnxruntime}.

- *Captured*: the largest difference of an output of a part between the captured float graph and transformers' eager
  model, of the spread of that output: features of pictures, merged embeddings, logits of a prompt with pictures and two
  steps.
- *Chain*: float exports of all three files, one after another in ONNX Runtime, on a text with two pictures and two
  calls behind it with the cache: the largest difference of logits from transformers' model, of the largest logit.
- By scheme, rounded to nearest, for the CPU: the least SQNR in dB of an output of the three files in ONNX Runtime
  against their quantized graphs in PyTorch. Weights alone leave rounding; of 8-bit values one on the border of two
  codes gets one here and the other there.
- *Attention* of the decoder: grouped has the shared cache.

| kind | rows of a picture | captured | chain | {schemes} | attention |
|---|---|---|---|{lines}---|
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("-o", "--out", type=Path, help="Markdown file to write")
    given = parser.parse_args(arguments)
    head = HEAD.format(
        qexport=version("qexport"), torch=torch.__version__, transformers=transformers.__version__,
        onnxruntime=onnxruntime.__version__, schemes=" | ".join(SCHEMES), lines="---|" * len(SCHEMES),
    )  # fmt: skip
    rows = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as place:
            rows.append(row(kind, Path(place)))
        print(rows[-1], flush=True)
    if given.out:
        given.out.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


def row(kind: str, place: Path) -> str:
    """A line of the table."""
    folder = save_pictures_model(kind, place / "model", processor=False)
    parts = capture_vision_language(open_model(folder))
    captured = max(check_reader(part).difference or 0.0 for part in parts.by_name.values())
    scores = [f"{agreement(parts, scheme, place / scheme):.0f}" for scheme in SCHEMES]
    far, rows, attention = chain(folder, parts, place / "float")
    return f"| {kind} | {rows} | {captured:.0e} | {far:.0e} | {' | '.join(scores)} | {attention} |"


def agreement(parts: VisionParts, scheme: str, place: Path) -> float:
    """The least SQNR of an output of the files against their graphs."""
    spec = CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2)
    recipe = Recipe(scheme=scheme, accuracy_level=1, calibration=spec)
    read = calibration_data(parts, load_examples(parts, spec, None, no_stage_progress), no_stage_progress)
    return min(
        value
        for name, part in parts.by_name.items()
        for value in _sqnr(exports.export(part, recipe, "cpu", place / name, calibration=read[name]), read[name])
    )


def _sqnr(made, read) -> Iterator[float]:
    file, graph = made.in_onnxruntime(), made.in_pytorch()
    for feeds in read.batches:
        got, want = file(dict(feeds)), graph(dict(feeds))
        for name, ours in want.items():
            if ours.is_floating_point() and not torch.equal(ours, got[name]):
                yield sqnr_db(ours, got[name])
    yield 300.0  # of outputs that are equal to the last bit


def chain(folder: Path, parts: VisionParts, place: Path) -> tuple[float, int, str]:
    """How far float files in a chain are from transformers, the rows of a picture, and the decoder's attention."""
    made = qexport.export(folder, Recipe(scheme="float"), out_dir=place)
    model = parts.model
    if model is None:
        raise TypeError("a small model is loaded whole")
    prompt = random_prompt(parts.kind, model, 2, 9)
    ids = prompt.input_ids.reshape(1, -1)
    reader, decoder = open_vision_language(place, max_length=ids.shape[1])
    rows = reader.read({name: tensor.numpy() for name, tensor in prompt.pictures.items()})
    calls = (ids[:, :-3], ids[:, -3:-1], ids[:, -1:])
    got = torch.cat([torch.tensor(decoder.run(part.numpy())) for part in calls], dim=1)
    behind = torch.arange(ids.shape[1])[None] >= calls[0].shape[1]  # a prompt is what the first call reads
    beside = {**parts.kind.beside(model.config, ids), **parts.kind.told(model.config, behind)}
    with torch.no_grad():
        want = model(input_ids=ids, **parts.kind.given(prompt.pictures, 1), **beside).logits
    far = float((got - want).abs().max() / want.abs().max())
    return far, rows // 2, made.parts[DECODER].manifest.settings["attention"]


if __name__ == "__main__":
    main()
