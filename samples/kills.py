"""Kill qexport at every change it makes to files, and see what is there then, and what the next run leaves.

    python samples/kills.py [--out samples/results/kills.md]

A process runs a command and looks at the files before each file-system call that Python knows of (audit events). It is
killed with SIGKILL wherever something has changed since the call before, which covers what libraries write in C++. At
that instant an output that was there has to be there still, and to be whole; then the command runs again, and nothing
but its result may lie beside the output, inside it, or among temporary files.
"""

import argparse
import copy
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the process is forked, and threads would not come along

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import qexport
from qexport.api import auto as choosing
from qexport.api.seq2seq import exporting as exporting_parts
from qexport.api.stages.capturing import capture_model
from qexport.artifact import checksums, swap
from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import DECODER, ENCODER
from qexport.artifact.ownership import is_export
from qexport.capture.graph import CapturedModel
from qexport.capture.seq2seq import Parts, capture_seq2seq
from qexport.errors import InputError, QExportError
from qexport.models.source import open_model
from qexport.report import read_validated  # noqa: F401  imported once, not in every process
from qexport.runtime.seq2seq import is_seq2seq
from qexport.validation.reader import check_reader

RECIPE, NOTES = "w4a16_g32_rtn", "what I think of this model"
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "qexport.")


@dataclass
class Command:
    """Something that people run.

    Attributes:
        prepare: makes what is there before, in a folder; run: runs it there.
        standing: an output is there before, so that there has to be one at every instant.
        noted: a file of the user's is in it.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    standing: bool
    noted: bool = True


@dataclass
class Outcome:
    """What kills of one command did.

    Attributes:
        events: file-system calls of one run; kills: those that something had changed before.
        stayed: kills after which the next run left something, and what; broken: instants without a whole output, or
            without the user's file; failed: next runs that failed.
    """

    command: str
    events: int = 0
    kills: int = 0
    dirty: int = 0
    stayed: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def commands(model: CapturedModel, parts: Parts) -> list[Command]:
    """Export, of an encoder-decoder too and with chosen schemes, export over another, optimize, again, validate.

    Args:
        parts: of an encoder-decoder.
    """

    def nothing(place: Path) -> None:
        pass

    def export(place: Path, overwrite: bool = False) -> None:
        qexport.export(model, RECIPE, out_dir=place / "out", overwrite=overwrite)

    def exported(place: Path) -> None:
        export(place)
        (place / "out" / "notes.txt").write_text(NOTES)

    def used(place: Path) -> None:
        exported(place)
        qexport.optimize(place / "out", repeats=1)

    def validate(place: Path) -> None:
        qexport.validate(place / "out", model, windows=1, window=16, greedy=0)

    def optimize(place: Path) -> None:
        qexport.optimize(place / "out", repeats=1)

    def over(place: Path) -> None:
        export(place, overwrite=True)

    def choose(place: Path) -> None:
        choosing.capture_model = lambda *_, **__: copy.deepcopy(model)  # which it does again for each trial
        qexport.export_auto(
            model.folder, out_dir=place / "out", max_bytes=200_000, calibration="random", windows=1, window=16
        )

    def export_parts(place: Path) -> None:
        exporting_parts.capture_seq2seq = lambda *_: parts
        qexport.export(parts.decoder.folder, RECIPE, out_dir=place / "out")

    def over_by_renames(place: Path) -> None:
        swap._renameat2 = lambda: None
        export(place, overwrite=True)

    return [
        Command("export", nothing, export, False, noted=False),
        Command("export --auto", nothing, choose, False, noted=False),
        Command("export of an encoder-decoder", nothing, export_parts, False, noted=False),
        Command("export --overwrite", used, over, True),
        Command("export --overwrite without renameat2", used, over_by_renames, False),
        Command("optimize", exported, optimize, True),
        Command("optimize again", used, optimize, True),
        Command("validate", exported, validate, True),
    ]


def tiny_model(folder: Path) -> CapturedModel:
    """A random Llama of two layers, captured once for all processes."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=2, bos_token_id=1,
    )).save_pretrained(folder)  # fmt: skip
    return checked(capture_model(folder))


def tiny_parts(folder: Path) -> Parts:
    """A random T5 of a layer each, captured once for all processes."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )).save_pretrained(folder)  # fmt: skip
    parts = capture_seq2seq(open_model(folder))
    checked(parts.encoder)
    checked(parts.decoder)
    return parts


def checked(captured: CapturedModel) -> CapturedModel:
    """The same, with its reader checked, once for all processes too."""
    check_reader(captured)
    return captured


def kill_everywhere(command: Command, root: Path, every: int = 1) -> Outcome:
    """Run a command once to count, then once for every `every`-th change to be killed there and once more after it."""
    outcome, template = Outcome(command.name), root / "template"
    template.mkdir()
    if _forked(lambda: command.prepare(template)) != 0:
        raise SystemExit(f"{command.name}: what it needs cannot be made")
    with _sandbox(root, template) as place:
        found = root / "changes"
        if _forked(lambda: _watched(command, place, root, found)) != 0:
            raise SystemExit(f"{command.name} fails")
        outcome.events, *changes = map(int, found.read_text().split())
        found.unlink()
    for number in changes[::every]:
        with _sandbox(root, template) as place:
            status = _forked(lambda place=place, number=number: _killed(command, place, root, number))
            if status == 0:
                continue  # its numbers are a little different from those of the run that counted
            where = f"event {number}"
            outcome.kills += 1
            if status != -signal.SIGKILL:
                outcome.failed.append(f"{where}: ended with {status} instead of being killed")
            outcome.dirty += bool(_left(place, root))
            if command.standing and (what := _wrong(place, command)):
                outcome.broken.append(f"{where}: {what}")
            if _forked(lambda place=place: _again(command, _entered(place, root))) != 0:
                outcome.failed.append(f"{where}: the next run failed")
                continue
            if left := _left(place, root):
                outcome.stayed.append(f"{where}: {', '.join(left)}")
            if what := _wrong(place, command):
                outcome.broken.append(f"{where}, after the next run: {what}")
    shutil.rmtree(template)
    return outcome


def _again(command: Command, place: Path) -> None:
    """The command as a user repeats it, who sees that an export has come to its end where it has."""
    try:
        command.run(place)
    except InputError as error:
        if "exists already" not in str(error) or not is_export(place / "out"):
            raise


def _wrong(place: Path, command: Command) -> str:
    """What is wrong with the output; empty where it is whole and the user's file is in it."""
    out = place / "out"
    if not out.is_dir():  # looked at first, as opening it may bring it back
        return "no output"
    try:
        for part in [out / ENCODER, out / DECODER] if is_seq2seq(out) else [out]:
            manifests.load(part)
            checksums.check(part)
    except QExportError as error:
        return str(error)
    if not is_export(out):
        return "no export"
    notes = out / "notes.txt"
    if command.noted and not (notes.is_file() and notes.read_text() == NOTES):
        return "the user's file is gone"
    return ""


def _left(place: Path, root: Path) -> list[str]:
    """What lies beside the output, hidden inside it, or among the temporary files."""
    beside = [str(p.relative_to(place)) for p in place.iterdir() if p.name != "out"]
    inside = [str(p.relative_to(place)) for p in place.glob("out/**/.*")]
    return sorted([*beside, *inside, *(f"$TMPDIR/{p.name}" for p in (root / "tmp").iterdir())])


class _sandbox:
    """A folder with what the command needs, and one for temporary files, both gone after the `with`."""

    def __init__(self, root: Path, template: Path):
        self._root, self._template = root, template

    def __enter__(self) -> Path:
        place = self._root / "place"
        shutil.copytree(self._template, place)
        (self._root / "tmp").mkdir()
        return place

    def __exit__(self, *error) -> None:
        shutil.rmtree(self._root / "place")
        shutil.rmtree(self._root / "tmp")


def _forked(work: Callable[[], None]) -> int:
    """Run in a process of its own; returns its exit status, negative for a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watched(command: Command, place: Path, root: Path, found: Path) -> None:
    """Run a command and note how many events there were, and before which ones something had changed."""
    changes, count, last = [], 0, _state(root)

    def see(event: str, number: int) -> None:
        nonlocal count, last
        count = number
        if (state := _state(root)) != last:
            changes.append(number)
            last = state

    hook = _Hook(root, see)
    command.run(_entered(place, root))
    hook.off = True
    if _state(root) != last:
        changes.append(count + 1)
    found.write_text(" ".join(map(str, [count, *changes])))


def _killed(command: Command, place: Path, root: Path, number: int) -> None:
    def kill(event: str, now: int) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _Hook(root, kill)
    command.run(_entered(place, root))


def _entered(place: Path, root: Path) -> Path:
    os.environ["TMPDIR"] = tempfile.tempdir = str(root / "tmp")
    return place


class _Hook:
    """Calls back before every file-system call on something below a folder; there is no way to take it off again."""

    def __init__(self, root: Path, heard: Callable[[str, int], None]):
        self._root, self._heard, self._count, self.off = str(root), heard, 0, False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.off or not event.startswith(_EVENTS):
            return
        if any(isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(self._root) for a in arguments):
            self._count += 1
            self.off = True  # what is looked at is no event
            self._heard(event, self._count)
            self.off = False


def _state(root: Path) -> list[tuple]:
    return sorted(_files(str(root)))


def _files(folder: str) -> Iterator[tuple]:
    for entry in os.scandir(folder):
        info = entry.stat(follow_symlinks=False)
        yield entry.path, info.st_ino, info.st_size if entry.is_file(follow_symlinks=False) else 0
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)


def table(outcomes: list[Outcome]) -> str:
    """A page of Markdown."""
    lines = [
        "# Kills", "",
        "`python samples/kills.py`: each command is killed (SIGKILL) wherever the files have changed since the",
        "file-system call before, and then run again.", "",
        "left-overs: kills that left something; next run: of these, how many still had something beside the output,",
        "hidden inside it or in $TMPDIR after the command ran again; broken: instants at which an output that had been",
        "there was not there whole, or the user's file was not in it (without renameat2 there is none between two",
        "renames, and the next run restores it).", "",
        "| command | file-system calls | kills | left-overs | after the next run | broken | next run failed |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for o in outcomes:
        counts = (o.events, o.kills, o.dirty, len(o.stayed), len(o.broken), len(o.failed))
        lines.append(f"| {o.command} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--every", type=int, default=1, help="kill at every N-th change only")
    parser.add_argument("--only", help="commands whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        model, parts = tiny_model(Path(folder) / "model"), tiny_parts(Path(folder) / "parts")
        root = Path(folder) / "root"
        root.mkdir()
        for command in commands(model, parts):
            if args.only is None or args.only in command.name:
                outcomes.append(kill_everywhere(command, root, args.every))
                found = outcomes[-1]
                print(f"{found.command}: {found.kills} kills", *found.stayed, *found.broken, *found.failed, sep="\n  ")
    print(table(outcomes))
    if args.out:
        args.out.write_text(table(outcomes), encoding="utf-8")
    sys.exit(any(o.stayed or o.broken or o.failed for o in outcomes))


if __name__ == "__main__":
    main()
