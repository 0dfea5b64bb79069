"""The speed of every part of models of several kinds beside its float file and ONNX Runtime's own quantization.

    python samples/speed_by_kind.py [--kinds t5 llava ...] [-o samples/results/speed_by_kind.md]

Weights are random and of the shapes of small published models: speed does not depend on them. Files run in turns on one
thread, and processor seconds are compared, so that what else the machine does is the same for all. Runs in a checkout
of the project, with its dependencies for tests.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from onnxruntime.quantization import quant_pre_process, quantize_dynamic
from onnxruntime.quantization.registry import IntegerOpsRegistry
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from qexport.artifact import manifest as manifests
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import open_session

_TEXT = {
    "vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "intermediate_size": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "projection_dim": 768,
}  # fmt: skip
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {"model_type": "llama", **_TEXT}),
    "mamba2": (AutoModelForCausalLM, {
        "model_type": "mamba2", "vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 6, "num_heads": 24,
        "head_dim": 64, "state_size": 128, "n_groups": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "bert": (AutoModel, {"model_type": "bert", **{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}}),
    "vit": (AutoModel, {**_VISION, "model_type": "vit"}),
    "t5": (AutoModelForSeq2SeqLM, {
        "model_type": "t5", "vocab_size": 8192, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
        "num_heads": 8, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }),
    "llava": (AutoModelForImageTextToText, {
        "model_type": "llava", "image_token_index": 8191, "vision_feature_layer": -1, "vision_config": _VISION,
        "vision_feature_select_strategy": "default", "text_config": {"model_type": "llama", **_TEXT},
    }),
}  # fmt: skip
SCHEMES = ("w8a8_dyn", "w8a8_static", "w4a16_g32")
CALLS = {"": (128, 0), "step": (1, 128)}  # new tokens and those in the cache
ROUNDS, SECONDS = 15, 0.03
# Its Attention is another operator of that name, and what it makes of ONNX's is refused.
_DYNAMIC = sorted({*IntegerOpsRegistry} - {"Attention"})
HEAD = """# Speed by kind

    python samples/speed_by_kind.py -o samples/results/speed_by_kind.md

Processor time of the float32 file over that of the file, on one thread, medians of {rounds} rounds in turns: above 1 is
faster. Six layers, random weights, rounded to nearest; 128 tokens or a picture of 224 pixels, and of decoders a step
behind 128 tokens too. `quantize_dynamic` is ONNX Runtime's own, of the float file, which keeps that file's attention.
qexport {qexport}, transformers {transformers}, ONNX Runtime {onnxruntime}.

| model | part | float32, ms | quantize_dynamic | {schemes} |
| --- | --- | --- | --- |{lines}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("-o", "--out", type=Path, help="Markdown file to write")
    given = parser.parse_args(arguments)
    head = HEAD.format(
        rounds=ROUNDS, qexport=qexport.__version__, transformers=transformers.__version__, onnxruntime=ort.__version__,
        schemes=" | ".join(SCHEMES), lines=" --- |" * len(SCHEMES),
    )  # fmt: skip
    rows: list[str] = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as place:
            for row in rows_of(kind, Path(place)):
                print(row, flush=True)
                rows.append(row)
    if given.out:
        given.out.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


def rows_of(kind: str, place: Path) -> list[str]:
    """A line for every part of a model, and for every call of one that has a cache."""
    loader, given = MODELS[kind]
    settings = dict(given)
    torch.manual_seed(0)
    model = loader.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    model.save_pretrained(place / "model")
    for scheme in ("float", *SCHEMES):
        few = {"source": "random", "samples": 4, "sequence_length": 64}
        recipe = Recipe(scheme=scheme, lm_head=scheme, weights={"method": "rtn"}, calibration=few)
        qexport.export(place / "model", recipe, out_dir=place / scheme)
    parts = sorted(path.parent.name for path in (place / "float").glob("*/model.onnx")) or [""]
    return [row for part in parts if part != "embedding" for row in _rows(kind, part, place)]


def _rows(kind: str, part: str, place: Path) -> list[str]:
    files = {scheme: place / scheme / part for scheme in ("float", *SCHEMES)}
    sessions = {name: open_session(path, manifests.load(path), threads=1) for name, path in files.items()}
    sessions["dynamic"] = _dynamic(files["float"])
    cached = any("past" in value.name for value in sessions["float"].get_inputs())
    found = []
    for call, (new, past) in CALLS.items() if cached else [("", CALLS[""])]:
        taken = _in_turns({name: (session, _feeds(session, new, past)) for name, session in sessions.items()})
        shown = [f"{taken['float'] / taken[name]:.2f}" for name in ("dynamic", *SCHEMES)]
        said = " ".join(word for word in (part or "all", call) if word)
        found.append(f"| {kind} | {said} | {1e3 * taken['float']:.1f} | {' | '.join(shown)} |")
    return found


def _dynamic(folder: Path) -> ort.InferenceSession:
    """ONNX Runtime's dynamic quantization of a float file, on one thread."""
    ready, out = folder / "prepared.onnx", folder / "dynamic.onnx"
    quant_pre_process(folder / "model.onnx", ready, skip_optimization=True, skip_symbolic_shape=True)
    # The types of what grouped attention makes are not inferred
    assumed = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(ready, out, op_types_to_quantize=_DYNAMIC, extra_options=assumed)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(out, options, providers=["CPUExecutionProvider"])


def _feeds(session: ort.InferenceSession, new: int, past: int) -> dict[str, np.ndarray]:
    """Random inputs of so many new tokens behind others."""
    random, sizes = np.random.default_rng(0), {"total_sequence_length": past + new, "past_sequence_length": past}

    def size(dim: int | str | None) -> int:
        if isinstance(dim, int):
            return dim
        if dim in sizes:
            return sizes[dim]
        return 1 if dim is None or "batch" in dim or "num_images" in dim else 128 if "encoder" in dim else new

    found = {}
    for value in session.get_inputs():
        shape = [size(dim) for dim in value.shape]
        if value.name == "position_ids":
            found[value.name] = np.broadcast_to(np.arange(past, past + new), shape).astype(np.int64)
        elif value.type == "tensor(int64)":
            found[value.name] = np.ones(shape, np.int64)
        else:
            found[value.name] = random.standard_normal(shape).astype(np.float32)
    return found


def _in_turns(runs: Mapping[str, tuple[ort.InferenceSession, dict[str, np.ndarray]]]) -> dict[str, float]:
    """Median processor seconds of a run of each, in turns."""
    many, taken = {}, {name: list[float]() for name in runs}
    for name, (session, feeds) in runs.items():
        session.run(None, feeds)
        start = time.process_time()
        session.run(None, feeds)
        many[name] = max(1, round(SECONDS / max(time.process_time() - start, 1e-4)))
    for _ in range(ROUNDS):
        for name, (session, feeds) in runs.items():
            start = time.process_time()
            for _ in range(many[name]):
                session.run(None, feeds)
            taken[name].append((time.process_time() - start) / many[name])
    return {name: median(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
