"""A step of decoding by operator: how many nodes, and how long their kernels take; and two folders in turns.

    python samples/decode_step.py out [other_export_or_builder_folder] [--past 2048] [--prompts 256 512]

One thread, one row, 128 to 200 tokens in the cache. Nodes are those of the session's own profile, and times of kernels
their tenth percentiles, as the clock also runs while others compute; the profile adds its own. The ratio of steps is
taken without it: processor time, the median over pairs of steps in turns; that of prompts as well.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import qexport  # noqa: F401, isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime as ort

from qexport.artifact import manifest as manifests
from qexport.runtime.decoder import Decoder, open_decoder
from qexport.runtime.session import session_options

PAST, STEPS = 128, 60


def profile(folder: Path, ids: np.ndarray, place: str, past: int) -> None:
    manifest = manifests.load_any(folder)
    options = session_options(manifest, threads=1)
    options.enable_profiling, options.profile_file_prefix = True, f"{place}/profile"
    session = ort.InferenceSession(folder / "model.onnx", options, providers=[manifest.provider])
    decoder = Decoder(session, manifest.settings, max_length=past + STEPS)
    decoder.run(ids[:, :past])
    for i in range(past, past + STEPS):
        decoder.run(ids[:, i : i + 1])
    took: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["cat"] == "Node" and event["name"].endswith("kernel_time"):
            took[event["args"]["op_name"], event["name"]].append(event["dur"])
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for (kind, _), times in took.items():
        kinds[kind].append(float(np.percentile(times[5:], 10)))
    total = sum(map(sum, kinds.values()))
    print(f"{folder}: {sum(map(len, kinds.values()))} nodes, {total:,.0f} us in kernels")
    for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        print(f"  {kind:34s} {len(times):4d} nodes {sum(times):7,.0f} us, {sum(times) / total:6.1%}")


def prompts_in_turns(decoders: list[Decoder], ids: np.ndarray, length: int, turns: int = 8) -> None:
    took: list[list[float]] = [[] for _ in decoders]
    for turn in range(turns):
        pairs = list(zip(decoders, took, strict=True))
        for decoder, times in pairs if turn % 2 else reversed(pairs):
            decoder.reset()
            began = time.process_time()
            decoder.run(ids[:, :length])
            times.append(time.process_time() - began)
    first, second = (np.array(times[1:]) for times in took)
    print(f"prompts of {length}: the first is {np.median(second / first):.2f} times as fast")


def in_turns(folders: list[Path], decoders: list[Decoder], ids: np.ndarray, past: int) -> None:
    took: list[list[float]] = [[] for _ in folders]
    for decoder in decoders:
        decoder.reset()
        decoder.run(ids[:, :past])
    for i in range(past, ids.shape[1] - 1):
        turn = list(zip(decoders, took, strict=True))
        for decoder, times in turn if i % 2 else reversed(turn):
            began = time.process_time()
            decoder.run(ids[:, i : i + 1])
            times.append(time.process_time() - began)
    first, second = (np.array(times[20:]) for times in took)
    for folder, times in zip(folders, (first, second), strict=True):
        print(f"{folder}: {1e3 * np.median(times):.2f} ms a step")
    print(f"the first is {np.median(second / first):.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--past", type=int, default=PAST, help="tokens in the cache")
    parser.add_argument("--prompts", type=int, nargs="*", default=(), help="lengths to compare as well")
    given = parser.parse_args()
    length = max(given.past + 384, *given.prompts)
    ids = np.random.default_rng(0).integers(0, 1000, (1, length))
    with tempfile.TemporaryDirectory() as place:
        for folder in given.folders:
            profile(folder, ids, place, given.past)
    if len(given.folders) == 2:
        decoders = [open_decoder(f, manifests.load_any(f), threads=1, max_length=length) for f in given.folders]
        in_turns(given.folders, decoders, ids, given.past)
        for count in given.prompts:
            prompts_in_turns(decoders, ids, count)


if __name__ == "__main__":
    main()
