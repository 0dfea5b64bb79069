"""A step of decoding by operator: how many nodes, and how long their kernels take; and two folders in turns.

    python samples/decode_step.py out [other_export_or_builder_folder]

One thread, one row, 128 to 200 tokens in the cache. Nodes are those of the session's own profile, and times of kernels
their tenth percentiles, as the clock also runs while others compute; the profile adds its own. The ratio of steps is
taken without it: processor time, the median over pairs of steps in turns.
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

PAST, STEPS, LENGTH = 128, 60, 512


def profile(folder: Path, ids: np.ndarray, place: str) -> None:
    manifest = manifests.load_any(folder)
    options = session_options(manifest, threads=1)
    options.enable_profiling, options.profile_file_prefix = True, f"{place}/profile"
    session = ort.InferenceSession(folder / "model.onnx", options, providers=[manifest.provider])
    decoder = Decoder(session, manifest.settings, max_length=LENGTH)
    decoder.run(ids[:, :PAST])
    for i in range(PAST, PAST + STEPS):
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


def in_turns(folders: list[Path], ids: np.ndarray) -> None:
    decoders = [open_decoder(f, manifests.load_any(f), threads=1, max_length=LENGTH) for f in folders]
    took: list[list[float]] = [[] for _ in folders]
    for decoder in decoders:
        decoder.run(ids[:, :PAST])
    for i in range(PAST, LENGTH - 1):
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
    given = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 1000, (1, LENGTH))
    with tempfile.TemporaryDirectory() as place:
        for folder in given.folders:
            profile(folder, ids, place)
    if len(given.folders) == 2:
        in_turns(given.folders, ids)


if __name__ == "__main__":
    main()
