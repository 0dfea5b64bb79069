"""How fast and how large an exported decoder is, alone or against another folder, measured in turns."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from ..errors import InputError, RuntimeProblem
from . import manifest as manifests
from .decoder import Decoder, open_decoder
from .manifest import Manifest

DECODE_STEPS = 16
_WORKER = "from qexport.runtime.bench import _serve; _serve()"


@dataclass(frozen=True)
class Measurement:
    """One folder, medians over the repeats.

    Attributes:
        folder: the folder.
        load_seconds: time to open a session on it, the files in the page cache.
        prefill: prompt length → prompt tokens a second, batch 1.
        decode: tokens already in the cache → new tokens a second, batch 1.
        memory_bytes: largest growth of the process over its size before the first load.
        model_bytes: size of the ONNX file and its data.
        samples: seconds of every repeat: "load", "prefill:{length}", "decode:{past}" (for all of its steps).
    """

    folder: str
    load_seconds: float
    prefill: dict[int, float]
    decode: dict[int, float]
    memory_bytes: int
    model_bytes: int
    samples: dict[str, list[float]]


@dataclass(frozen=True)
class BenchResult:
    """Measurements, and how the first folder compares with the second where there is one.

    ratios: first / second of every quantity; above 1 is faster for "prefill:…" and "decode:…", and larger or slower for
    "load_seconds", "memory_bytes" and "model_bytes".
    """

    first: Measurement
    second: Measurement | None
    ratios: dict[str, float]
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    prompt_lengths: Sequence[int] = (128, 512),
    decode_pasts: Sequence[int] = (128,),
    repeats: int = 5,
    threads: int = 2,
    provider: str | None = None,
) -> BenchResult:
    """Measure a decoder folder of qexport or of onnxruntime-genai's model builder.

    Each folder has a process of its own, so that memory and load time are its own; the repeats alternate between the
    folders (A B A B), so that a change in the machine's speed meets both. Tokens are random, sampling is not timed.

    Raises:
        InputError: a folder is no decoder, or the numbers asked for are not positive.
        RuntimeProblem: a folder does not load or run, or its process dies.
    """
    if repeats < 1 or threads < 1 or min([*prompt_lengths, *decode_pasts, 1]) < 1:
        raise InputError("prompt lengths, pasts, repeats and threads are 1 or more")
    folders = [Path(path) for path in (folder, against) if path is not None]
    plans = [_describe(path) for path in folders]
    longest = max([*prompt_lengths, *(past + DECODE_STEPS for past in decode_pasts)], default=1)
    workers: list[_Worker] = []
    samples: list[dict[str, list[float]]] = [{} for _ in folders]
    memory: list[int] = []
    try:
        for path, plan in zip(folders, plans, strict=True):
            workers.append(_Worker(path, plan, threads, provider, longest))
        jobs = [("load", 0), *(("prefill", n) for n in prompt_lengths), *(("decode", n) for n in decode_pasts)]
        for what, tokens in jobs:
            key = what if what == "load" else f"{what}:{tokens}"
            for repeat in range(repeats + 1):
                for worker, kept in zip(workers, samples, strict=True):
                    seconds = worker.ask(what, tokens)
                    if repeat:  # the first round warms caches and memory up
                        kept.setdefault(key, []).append(seconds)
        memory = [int(worker.ask("memory", 0)) for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    results = [_summarize(*parts) for parts in zip(folders, plans, samples, memory, strict=True)]
    second = results[1] if len(results) > 1 else None
    return BenchResult(results[0], second, _ratios(results[0], second) if second else {}, threads)


def _describe(folder: Path) -> Manifest:
    has_manifest = (folder / manifests.MANIFEST_FILE).is_file() or not (folder / manifests.GENAI_FILE).is_file()
    plan = manifests.load(folder) if has_manifest else manifests.load_genai(folder)
    if plan.kind != "decoder":
        raise InputError(f"this export is a {plan.kind}, and bench measures decoders", place=str(folder))
    return plan


def _summarize(folder: Path, plan: Manifest, samples: dict[str, list[float]], memory: int) -> Measurement:
    middle = {key: median(values) for key, values in samples.items()}

    def rates(what: str, tokens_of: Any) -> dict[int, float]:
        found = {int(key.split(":")[1]): seconds for key, seconds in middle.items() if key.startswith(what)}
        return {n: tokens_of(n) / seconds for n, seconds in found.items()}

    name = plan.settings.get("filename", manifests.MODEL_FILE)
    return Measurement(
        folder=str(folder),
        load_seconds=middle["load"],
        prefill=rates("prefill", lambda n: n),
        decode=rates("decode", lambda n: DECODE_STEPS),
        memory_bytes=memory,
        model_bytes=sum(path.stat().st_size for path in folder.glob(f"{name}*") if path.is_file()),
        samples=samples,
    )


def _ratios(first: Measurement, second: Measurement) -> dict[str, float]:
    ratios = {
        name: getattr(first, name) / max(getattr(second, name), 1e-12)
        for name in ("load_seconds", "memory_bytes", "model_bytes")
    }
    ratios |= {f"prefill:{n}": rate / second.prefill[n] for n, rate in first.prefill.items()}
    return ratios | {f"decode:{n}": rate / second.decode[n] for n, rate in first.decode.items()}


class _Worker:
    """A process that holds one folder and answers one request a line."""

    def __init__(self, folder: Path, plan: Manifest, threads: int, provider: str | None, max_length: int):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # The child imports this very package, wherever the parent found it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._send(
            {
                "folder": str(folder),
                "manifest": plan.model_dump(mode="json"),
                "threads": threads,
                "provider": provider,
                "max_length": max_length,
            }
        )

    def ask(self, what: str, tokens: int) -> float:
        self._send({"what": what, "tokens": tokens})
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeProblem(
                f"the process that measures it died with status {code}",
                place=str(self._folder),
                remedy="Out of memory? Try shorter prompts" if code < 0 else "See the lines above",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeProblem(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer says it


class _Subject:
    """The folder inside its process."""

    def __init__(self, setup: dict[str, Any]):
        self._setup, self._plan = setup, Manifest.model_validate(setup["manifest"])
        self._decoder: Decoder | None = None
        self._before = psutil.Process().memory_info().rss
        _forget_peak()

    def load(self, tokens: int) -> float:
        self._decoder = None
        start = perf_counter()
        self._decoder = open_decoder(
            self._setup["folder"],
            self._plan,
            threads=self._setup["threads"],
            provider=self._setup["provider"],
            max_length=self._setup["max_length"],
        )
        return perf_counter() - start

    def prefill(self, tokens: int) -> float:
        self._decoder.reset()
        ids = self._ids(tokens)
        start = perf_counter()
        self._decoder.run(ids)
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        self.prefill(tokens)
        ids = self._ids(DECODE_STEPS)
        start = perf_counter()
        for step in range(DECODE_STEPS):
            self._decoder.run(ids[:, step : step + 1])
        return perf_counter() - start

    def memory(self, tokens: int) -> int:
        return max(_peak() - self._before, 0)

    def _ids(self, tokens: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self._plan.settings["vocab_size"], (1, tokens))


def _serve() -> None:
    """Answer requests on stdin until it closes; the first line is the setup."""
    subject = None
    for line in sys.stdin:
        request = json.loads(line)
        if subject is None:
            subject = _Subject(request)
            continue
        try:
            answer = {"value": getattr(subject, request["what"])(request["tokens"])}
        except Exception as error:  # crosses a process: the parent raises it again
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def _forget_peak() -> None:
    """Start the peak anew; otherwise imports, or the parent before exec, could have set it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux


def _peak() -> int:
    """Largest resident size of this process in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return info.peak_wset
    import resource  # macOS, where ru_maxrss is in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
