"""A process of its own for each folder that `bench` measures: both ends of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from ..artifact.manifest import DECODER, Manifest
from ..errors import RuntimeProblem
from .decoder import Decoder, open_decoder
from .seq2seq import EncoderDecoder, is_seq2seq, open_seq2seq
from .vision_language import PicturesAndText, is_vision_language, open_reader

_CHILD = "from qexport.runtime.bench_process import _serve; _serve()"


class BenchProcess:
    """A process that holds one folder and answers one request a line.

    Args:
        max_length: tokens that a shared cache has to hold.

    Every request raises RuntimeProblem when the folder does not load or run, or when the process dies.
    """

    def __init__(self, folder: Path, plan: Manifest, threads: int | None, provider: str | None, max_length: int):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # The child imports this very package, wherever the parent found it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both were asked for")
        self._to, self._from = self._process.stdin, self._process.stdout
        self._send(
            {
                "folder": str(folder),
                "manifest": plan.model_dump(mode="json"),
                "threads": threads,
                "provider": provider,
                "max_length": max_length,
            }
        )

    def load(self) -> float:
        """Seconds to open a session, in place of the one before."""
        seconds: float = self._ask("load")
        return seconds

    def run(self, tokens: int, steps: int, batch: int) -> tuple[float, float | None]:
        """Seconds of `batch` prompts of `tokens`, and the median of the `steps` single tokens of each after them.

        That is None without any.
        """
        prefill, step = self._ask("run", tokens, steps, batch)
        return prefill, step

    def memory(self) -> int:
        """Bytes by which the process grew at most over its size before the first load."""
        grown: int = self._ask("memory")
        return grown

    def close(self) -> None:
        self._to.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()

    def _ask(self, what: str, *arguments: int) -> Any:
        self._send({"what": what, "arguments": arguments})
        line = self._from.readline()
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

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._to.write(json.dumps(message) + "\n")
            self._to.flush()
        except BrokenPipeError:
            pass  # the missing answer says it


class _Subject:
    """The folder inside its process."""

    def __init__(self, setup: dict[str, Any]):
        self._setup, self._plan = setup, Manifest.model_validate(setup["manifest"])
        self._decoder: Decoder | None = None
        self._pair: EncoderDecoder | None = None
        self._reader: PicturesAndText | None = None
        self._before = psutil.Process().memory_info().rss
        _forget_peak()

    def load(self) -> float:
        self._decoder = self._pair = self._reader = None
        folder, options = self._setup["folder"], {name: self._setup[name] for name in ("threads", "provider")}
        start = perf_counter()
        if is_seq2seq(folder):
            self._pair = open_seq2seq(folder, **options)
            return perf_counter() - start
        if is_vision_language(folder):
            self._reader = open_reader(folder, **options)
            read = perf_counter()
            longest = self._setup["max_length"] + self._rows(self._reader)
            begin = perf_counter()
            self._decoder = open_decoder(
                Path(folder) / DECODER, self._plan, max_length=longest, embed=self._reader, **options
            )  # fmt: skip
            return perf_counter() - begin + read - start
        self._decoder = open_decoder(
            self._setup["folder"],
            self._plan,
            threads=self._setup["threads"],
            provider=self._setup["provider"],
            max_length=self._setup["max_length"],
        )
        return perf_counter() - start

    def run(self, tokens: int, steps: int, batch: int) -> tuple[float, float | None]:
        if self._pair is not None:
            return _about_a_source(self._pair, self._plan.settings["vocab_size"], tokens, steps, batch)
        if self._reader is not None and self._decoder is not None:
            return _about_pictures(
                self._reader, self._decoder, self._plan.settings["vocab_size"], tokens, steps, batch
            )  # fmt: skip
        ids = np.random.default_rng(0).integers(0, self._plan.settings["vocab_size"], (batch, tokens + steps))
        if (decoder := self._decoder) is None:
            raise RuntimeProblem("nothing is loaded yet")
        decoder.reset()
        times = [_seconds(decoder, ids[:, :tokens])]
        times += [_seconds(decoder, ids[:, i : i + 1]) for i in range(tokens, tokens + steps)]
        return times[0], median(times[1:]) if steps else None

    def _rows(self, reader: PicturesAndText) -> int:
        """Tokens that stand for a picture; so many more have to fit behind which a text goes on."""
        rows, longest = reader.read(reader.any_pictures(1)), self._setup["max_length"]
        context = self._plan.settings.get("max_position_embeddings")
        if context is not None and rows + longest > context:
            raise RuntimeProblem(
                f"{longest} tokens behind the {rows} of a picture do not fit: the model reads {context}",
                place=str(self._setup["folder"]), remedy="Ask for shorter prompts",
            )  # fmt: skip
        return rows

    def memory(self) -> int:
        return max(_peak() - self._before, 0)


def _about_a_source(
    pair: EncoderDecoder, vocabulary: int, tokens: int, steps: int, batch: int
) -> tuple[float, float | None]:
    """The same of an encoder-decoder: seconds to read sources up to the first token, and of the steps after it."""
    source, first = pair.any_source(batch, tokens, vocabulary), np.full((batch, 1), pair.habits.start[0])
    start = perf_counter()
    pair.read(source)
    pair.decoder.run(first)
    read = perf_counter() - start
    times = [_seconds(pair.decoder, first) for _ in range(steps)]
    return read, median(times) if times else None


def _about_pictures(
    reader: PicturesAndText, decoder: Decoder, vocabulary: int, tokens: int, steps: int, batch: int
) -> tuple[float, float | None]:
    """The same of a model of pictures and text: seconds to read a picture with a text behind it, and of the steps."""
    pictures = reader.any_pictures(batch)
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens + steps))
    ids = np.where(ids == reader.token, (ids + 1) % vocabulary, ids)
    decoder.reset()
    start = perf_counter()
    rows = reader.read(pictures) // batch
    decoder.run(np.concatenate([np.full((batch, rows), reader.token), ids[:, :tokens]], axis=1))
    read = perf_counter() - start
    times = [_seconds(decoder, ids[:, i : i + 1]) for i in range(tokens, tokens + steps)]
    return read, median(times) if times else None


def _seconds(decoder: Decoder, ids: np.ndarray) -> float:
    start = perf_counter()
    decoder.run(ids)
    return perf_counter() - start


def _serve() -> None:
    """Answer requests on stdin until it closes; the first line is the setup."""
    subject = None
    for line in sys.stdin:
        request = json.loads(line)
        if subject is None:
            subject = _Subject(request)
            continue
        try:
            answer = {"value": getattr(subject, request["what"])(*request["arguments"])}
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
