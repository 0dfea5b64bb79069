"""An export read by OpenVINO: how near its logits are to ONNX Runtime's, and how fast both read a prompt, in turns.

    pip install openvino
    python samples/openvino_reader.py out [other_export ...] --text text.txt
    python samples/openvino_reader.py --table operators.json

The table has the operators of which OpenVINO compiles a model alone, with their versions and types of the first input:
models of one node from onnx.backend.test. Of exports it prints a line of JSON for every folder: the share of tokens
whose likeliest successor is the same, the mean KL from ONNX Runtime's distribution to OpenVINO's, and the medians of
both over the turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from webgpu_reader import compiling

from qexport.runtime.generate import open_tokenizer
from qexport.runtime.session import open_session


def feeds_of(names_and_shapes: dict[str, list], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs for a prompt with nothing before it."""
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    feeds = {name: value for name, value in feeds.items() if name in names_and_shapes}
    for name, shape in names_and_shapes.items():
        if name.startswith("past"):
            feeds[name] = np.zeros([1, shape[1], 0, shape[3]], np.float32)
    return feeds


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(folder: Path, ids: np.ndarray, threads: int, turns: int) -> dict[str, object]:
    import openvino

    session = open_session(folder, threads=threads)
    feeds = feeds_of({value.name: value.shape for value in session.get_inputs()}, ids)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", options)
    seconds: dict[str, list[float]] = {"onnxruntime": [], "openvino": []}
    runs = {
        "onnxruntime": lambda: session.run(["logits"], feeds)[0],
        "openvino": lambda: compiled(feeds)["logits"],
    }
    found = {}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (log_softmax(np.asarray(found[name])) for name in runs)
    speed = {name: round(ids.shape[1] / statistics.median(took), 1) for name, took in seconds.items()}
    return {
        "folder": str(folder), "same_likeliest": round(float((ours.argmax(-1) == theirs.argmax(-1)).mean()), 4),
        "kl": float((np.exp(ours) * (ours - theirs)).sum(-1).mean()), "prefill_tokens_per_second": speed,
    }  # fmt: skip


def table() -> dict[str, dict[int, list[str]]]:
    """What OpenVINO compiles, by operator, version and type of the first input."""
    import openvino

    core = openvino.Core()

    def compile_model(model: bytes) -> None:
        core.compile_model(core.read_model(model), "CPU")

    return compiling(compile_model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--table", type=Path, help="write the operators here")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    if given.table:
        given.table.write_text(json.dumps(table(), indent=1))
    if not given.folders:
        return
    if given.text is None:
        parser.error("--text is missing")
    text = given.text.read_text(encoding="utf-8")[: 20 * given.tokens]
    ids = np.array(open_tokenizer(given.folders[0])(text)["input_ids"][: given.tokens])[None]
    for folder in given.folders:
        print(json.dumps(compare(folder, ids, given.threads, given.turns)), flush=True)


if __name__ == "__main__":
    main()
