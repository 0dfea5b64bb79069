"""A process of its own for each folder that `bench` measures: both ends of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import psutil

from ..artifact.manifest import DECODER, Manifest
from ..errors import RuntimeProblem
from .decoder import Decoder, open_decoder
from .seq2seq import EncoderDecoder, is_seq2seq, open_seq2seq
from .vision_language import PicturesAndText, is_vision_language, open_reader

# Seconds. Threads of a session wait for more work at full speed for a tenth of one, at the cost of whoever runs next.
_PAUSE = 0.15
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

    def prefill(self, tokens: int, batch: int) -> float:
        """Seconds of `batch` prompts of `tokens`."""
        seconds: float = self._ask("prefill", tokens, batch)
        return seconds

    def decode(self, steps: int) -> float:
        """The median of the seconds of so many single tokens more of each prompt that was read last."""
        seconds: float = self._ask("decode", steps)
        return seconds

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
        self._random, self._batch, self._first = np.random.default_rng(0), 1, np.zeros((1, 1), np.int64)
        self._before = psutil.Process().memory_info().rss
        _forget_peak()

    def wait_for_others(self) -> None:
        """Until the threads of the process that was measured before sleep; a single thread has none beside it."""
        if self._setup["threads"] != 1:
            sleep(_PAUSE)

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

    def prefill(self, tokens: int, batch: int) -> float:
        self._random = np.random.default_rng(0)
        if self._pair is not None:
            self._first = np.full((batch, 1), self._pair.habits.start[0])
            source = self._pair.any_source(batch, tokens, self._plan.settings["vocab_size"])
            start = perf_counter()
            self._pair.read(source)
            self._pair.decoder.run(self._first)
            return perf_counter() - start
        ids, self._batch = self._ids(batch, tokens), batch
        decoder = self._loaded()
        decoder.reset()
        if self._reader is None:
            return _seconds(decoder, ids)
        pictures = self._reader.any_pictures(batch)
        start = perf_counter()
        rows = self._reader.read(pictures) // batch
        decoder.run(np.concatenate([np.full((batch, rows), self._reader.token), ids], axis=1))
        return perf_counter() - start

    def decode(self, steps: int) -> float:
        if self._pair is not None:
            return median(_seconds(self._pair.decoder, self._first) for _ in range(steps))
        decoder = self._loaded()
        return median(_seconds(decoder, self._ids(self._batch, 1)) for _ in range(steps))

    def _ids(self, batch: int, tokens: int) -> np.ndarray:
        """Tokens at random, none of which stands for a picture."""
        vocabulary = self._plan.settings["vocab_size"]
        ids = self._random.integers(0, vocabulary, (batch, tokens))
        return ids if self._reader is None else np.where(ids == self._reader.token, (ids + 1) % vocabulary, ids)

    def _loaded(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeProblem("nothing is loaded yet")
        return self._decoder

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
        subject.wait_for_others()
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
