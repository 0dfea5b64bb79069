"""A step of decoding by operator: how many nodes, and how long their kernels take; and two folders in turns.

    python samples/decode_step.py out [other_export_or_builder_folder] [--past 2048] [--prompts 256 512] [--threads 1 2]

One row, 128 to 200 tokens in the cache. Nodes are those of the session's own profile, and times of kernels their tenth
percentiles, as the clock also runs while others compute; the profile adds its own. What products read is counted from
their shapes (codes, scales of float32), and beside it stands what memory gives: the best of ten sums over a gigabyte.
The ratio of steps is taken without the profile: the time of the clock, or with one thread of the processor, the median
over pairs of steps in turns; that of prompts as well.
"""

import argparse
import collections
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

import qexport  # noqa: F401, isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime as ort

from qexport.artifact import manifest as manifests
from qexport.runtime.decoder import Decoder, open_decoder
from qexport.runtime.session import session_options

PAST, STEPS = 128, 60
PRODUCT = "MatMulNBits"
HOLDERS = ("If", "Loop", "Scan")  # whose nodes are counted themselves


@dataclass(frozen=True)
class Profile:
    """Of a step: microseconds of every node by operator, and the bytes of weights that the products read."""

    kinds: dict[str, list[float]]
    bytes: float

    @property
    def total(self) -> float:
        return sum(map(sum, self.kinds.values()))


def clock(threads: int) -> Callable[[], float]:
    """Of one thread the processor's, which what else runs does not move; several wait for each other."""
    return time.process_time if threads == 1 else time.perf_counter


def weight_bytes(folder: Path) -> float:
    """What a token reads of weights in blocks: their codes and a float32 scale for each block."""
    total = 0.0
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        if node.op_type == PRODUCT:
            given = {a.name: a.i for a in node.attribute}
            total += given["K"] * given["N"] * (given["bits"] / 8 + 4 / given["block_size"])
    return total


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that a sum reads."""
    torch.set_num_threads(threads)
    now, x, best = clock(threads), torch.ones(2**28), float("inf")
    for _ in range(10):
        began = now()
        x.sum()
        best = min(best, now() - began)
    return x.nbytes / best


def profile(folder: Path, ids: np.ndarray, place: str, past: int, threads: int) -> Profile:
    manifest = manifests.load_any(folder)
    options = session_options(manifest, threads=threads)
    options.enable_profiling, options.profile_file_prefix = True, f"{place}/profile"
    session = ort.InferenceSession(folder / "model.onnx", options, providers=[manifest.provider])
    decoder = Decoder(session, manifest.settings, max_length=past + STEPS)
    decoder.run(ids[:, :past])
    for i in range(past, past + STEPS):
        decoder.run(ids[:, i : i + 1])
    took: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["cat"] != "Node" or event["args"].get("op_name") in HOLDERS:
            continue
        if event["name"].endswith("kernel_time"):
            took[event["args"]["op_name"], event["name"]].append(event["dur"])
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for (kind, _), times in took.items():
        if len(times) >= STEPS:  # else it is of the prompt alone, in a branch of its own
            kinds[kind].append(float(np.percentile(times[5 - STEPS :], 10)))
    return Profile(kinds, weight_bytes(folder))


def print_table(folders: list[Path], profiles: list[Profile], threads: int) -> None:
    kinds = sorted({kind for p in profiles for kind in p.kinds}, key=lambda k: -max(sum(p.kinds[k]) for p in profiles))
    print(f"\n| {threads} threads, us of kernels (nodes) | {' | '.join(map(str, folders))} |")
    print(f"| --- |{' --- |' * len(folders)}")
    for kind in kinds:
        print(f"| {kind} | {' | '.join(f'{sum(p.kinds[kind]):,.0f} ({len(p.kinds[kind])})' for p in profiles)} |")
    rows = [("together", [f"{p.total:,.0f} ({sum(map(len, p.kinds.values()))})" for p in profiles])]
    if all(p.bytes and p.kinds[PRODUCT] for p in profiles):
        speeds = [p.bytes / sum(p.kinds[PRODUCT]) / 1e3 for p in profiles]
        reads = zip(profiles, speeds, strict=True)
        rows.append(("products read", [f"{p.bytes / 1e6:.1f} MB, {speed:.1f} GB/s" for p, speed in reads]))
        bandwidth = memory_bandwidth(threads)
        floors = [p.total - sum(p.kinds[PRODUCT]) + p.bytes / bandwidth * 1e6 for p in profiles]
        rows.append((f"at memory's {bandwidth / 1e9:.1f} GB/s", [f"{floor:,.0f}" for floor in floors]))
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def prompts_in_turns(decoders: list[Decoder], ids: np.ndarray, length: int, threads: int, turns: int) -> None:
    now = clock(threads)
    took: list[list[float]] = [[] for _ in decoders]
    for turn in range(turns):
        pairs = list(zip(decoders, took, strict=True))
        for decoder, times in pairs if turn % 2 else reversed(pairs):
            decoder.reset()
            began = now()
            decoder.run(ids[:, :length])
            times.append(now() - began)
    first, second = (np.array(times[1:]) for times in took)
    print(f"prompts of {length}: the first is {np.median(second / first):.2f} times as fast")


def in_turns(folders: list[Path], decoders: list[Decoder], ids: np.ndarray, past: int, threads: int) -> None:
    now = clock(threads)
    took: list[list[float]] = [[] for _ in folders]
    for decoder in decoders:
        decoder.reset()
        decoder.run(ids[:, :past])
    for i in range(past, ids.shape[1] - 1):
        turn = list(zip(decoders, took, strict=True))
        for decoder, times in turn if i % 2 else reversed(turn):
            began = now()
            decoder.run(ids[:, i : i + 1])
            times.append(now() - began)
    first, second = (np.array(times[20:]) for times in took)
    for folder, times in zip(folders, (first, second), strict=True):
        print(f"{folder}: {1e3 * np.median(times):.2f} ms a step")
    print(f"the first is {np.median(second / first):.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--past", type=int, default=PAST, help="tokens in the cache")
    parser.add_argument("--prompts", type=int, nargs="*", default=(), help="lengths to compare as well")
    parser.add_argument("--turns", type=int, default=8, help="of prompts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of an operator")
    given = parser.parse_args()
    length = max([given.past + 384, *given.prompts])
    ids = np.random.default_rng(0).integers(0, 1000, (1, length))
    for threads in given.threads:
        with tempfile.TemporaryDirectory() as place:
            profiles = [profile(folder, ids, place, given.past, threads) for folder in given.folders]
        print_table(given.folders, profiles, threads)
        if len(given.folders) == 2:
            decoders = [
                open_decoder(f, manifests.load_any(f), threads=threads, max_length=length) for f in given.folders
            ]
            in_turns(given.folders, decoders, ids, given.past, threads)
            for count in given.prompts:
                prompts_in_turns(decoders, ids, count, threads, given.turns)


if __name__ == "__main__":
    main()
