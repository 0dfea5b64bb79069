"""Run commands on damaged inputs, each in a process of its own that is forked from this one, and judge what came of it.

A fork has everything imported already and costs tens of milliseconds; what it ends with says all: its status, its peak
of memory, and what it wrote.
"""

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .mutations import mutate

HUNG = 20  # seconds of computing
_AS_PYTHON = "backslashreplace"  # is how its own stderr writes what has no encoding
_WAIT = 120  # seconds in all, on a machine that has other things to do
ROOM = 8 << 30  # bytes of addresses beyond those of this process

EXPORT = ("export", "{model}", "-o", "{out}", "-r", "w8a16_g32")
CALIBRATED = (
    "export", "{model}", "-o", "{out}", "-r", "w8a8_static", "--calibration", "{seeds}/text.txt",
    "--samples", "2", "--sequence-length", "16",
)  # fmt: skip
GENERATE = ("generate", "{model}", "-p", "the fox", "--max-new-tokens", "3")
READERS = (
    GENERATE, ("report", "{model}"), ("optimize", "{model}"),
    ("validate", "{model}", "--reference", "{seeds}/llama", "--windows", "1", "--window", "16", "--greedy", "2"),
    ("bench", "{model}", "--prompt-length", "4", "--past", "4", "--repeats", "1", "--threads", "1"),
    ("report", "{model}", "{seeds}/export"), ("export", "{seeds}/llama", "-o", "{model}", "--overwrite"),
)  # fmt: skip
MODELS = ("llama", "gpt2", "gemma3", "mixtral", "bert")


@dataclass(frozen=True)
class Kind:
    """A kind of damaged file.

    Attributes:
        share: of all mutations; files: one of which is damaged, in a copy of one of `seeds`; commands: one of which
            reads it.
    """

    share: float
    seeds: tuple[str, ...]
    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


KINDS = {
    "config.json": Kind(0.28, MODELS, ("config.json",), (EXPORT,)),
    "generation_config.json": Kind(0.06, MODELS[:4], ("generation_config.json",), (EXPORT,)),
    "tokenizer.json": Kind(0.1, ("llama",), ("tokenizer.json",), (CALIBRATED, EXPORT)),
    "tokenizer_config.json": Kind(0.06, ("llama",), ("tokenizer_config.json",), (CALIBRATED, EXPORT)),
    "chat template": Kind(0.05, ("export",), ("chat_template.jinja",), ((*GENERATE, "--chat"),)),
    "GGUF": Kind(0.12, ("model.gguf",), ("model.gguf",), (EXPORT,)),
    "safetensors": Kind(0.08, ("llama",), ("model.safetensors",), (EXPORT,)),
    "safetensors index": Kind(0.05, ("sharded",), ("model.safetensors.index.json",), (EXPORT,)),
    "recipe": Kind(0.1, ("recipe.yaml",), ("recipe.yaml",),
                   (("export", "{seeds}/llama", "-o", "{out}", "-r", "{model}", "--calibration", "{seeds}/text.txt"),)),
    "manifest and configs of an export": Kind(
        0.06, ("export",), ("manifest.json", "genai_config.json", "config.json", "tokenizer.json"), READERS
    ),
    "report of an export": Kind(0.04, ("export",), ("report.json", "recipe.yaml"), READERS[1:4]),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a command made of a damaged file.

    Attributes:
        result: "done" (exit code 0), "refused" (one sentence and exit code 2), "traceback" (anything else, a signal
            that ended it too) or "hung".
        seconds: of computing; bytes: the most memory it had.
    """

    number: int
    kind: str
    what: str
    command: str
    result: str
    said: str
    seconds: float
    bytes: int


def numbers(count: int) -> list[tuple[int, str]]:
    """(number, kind) of `count` mutations, every kind with its share."""
    kinds = [name for name, kind in KINDS.items() for _ in range(max(1, round(kind.share * count)))]
    return list(enumerate(kinds))


def run_all(jobs: Iterable[tuple[int, str]], seeds: Path, work: Path, show: Callable[[Run], None] = lambda run: None):
    """Yields a Run for each job, one after another."""
    for number, kind in jobs:
        found = run_one(number, kind, seeds, work)
        show(found)
        yield found


def run_one(number: int, name: str, seeds: Path, work: Path) -> Run:
    """Damage a copy of what a kind names, with the number as seed, and run a command on it."""
    kind, random = KINDS[name], Random(f"{name} {number}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    seed = seeds / random.choice(kind.seeds)
    model = work / seed.name
    shutil.copytree(seed, model) if seed.is_dir() else shutil.copyfile(seed, model)
    file = model / random.choice(kind.files) if model.is_dir() else model
    what = f"{seed.name}: {mutate(file, random)}"
    command = [part.format(model=model, out=work / "out", seeds=seeds) for part in random.choice(kind.commands)]
    result, said, seconds, most = _call(command, work)
    return Run(number, name, what, command[0], result, said, seconds, most)


def _call(command: list[str], work: Path) -> tuple[str, str, float, int]:
    written, started = work / "written.txt", time.monotonic()
    process = os.fork()
    if not process:
        _become(command, written, work)
    hung = False
    while True:
        ended, status, used = os.wait4(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - started > _WAIT:
            hung = True
            os.kill(process, signal.SIGKILL)
            _, status, used = os.wait4(process, 0)
            break
        time.sleep(0.01)
    said = written.read_text(errors="replace") if written.exists() else ""
    hung = hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
    result = "hung" if hung else _judged(status, said)
    return result, said[-3000:], used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def _judged(status: int, said: str) -> str:
    if not os.WIFEXITED(status) or "Traceback (most recent call last)" in said:
        return "traceback"
    if os.WEXITSTATUS(status) == 0:
        return "done"
    # What a library of Rust says of its panic comes before, on a stream that no Python reads.
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    last = said.strip().splitlines()[-1:]
    return "refused" if os.WEXITSTATUS(status) == 2 and len(errors) == 1 and last == errors else "traceback"


def _become(command: list[str], written: Path, work: Path) -> None:
    """Be the command: what it prints goes to a file; never returns."""
    code = 70
    try:
        out = os.open(os.devnull, os.O_WRONLY)
        err = os.open(written, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False, errors=_AS_PYTHON)
        os.environ.update(XDG_CACHE_HOME=str(work / "cache"), HF_HUB_OFFLINE="1")
        os.chdir(work)
        addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (addresses + ROOM, addresses + ROOM))
        resource.setrlimit(resource.RLIMIT_CPU, (HUNG, HUNG + 5))
        sys.argv = ["qexport", *command]
        from qexport import cli

        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def table(runs: Iterable[Run]) -> str:
    """The counts by kind, as a table in Markdown."""
    runs, lines = list(runs), ["| kind | mutations | done | refused | tracebacks | hangs | seconds, most | MB, most |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in [*KINDS, "all"]:
        of = [run for run in runs if name in (run.kind, "all")]
        if of:
            found = Counter(run.result for run in of)
            counts = [found[result] for result in ("done", "refused", "traceback", "hung")]
            seconds, most = max(run.seconds for run in of), max(run.bytes for run in of) / 1e6
            lines.append(f"| {name} | {len(of)} | {' | '.join(map(str, counts))} | {seconds:.0f} | {most:.0f} |")
    return "\n".join(lines)
