"""How fast and how large exported decoders are, alone or behind encoders, measured in turns to be compared."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import manifest as manifests
from ..artifact.manifest import DECODER, ENCODER, PICTURE_PARTS, Manifest
from ..errors import InputError
from ..progress import Progress, no_progress
from .bench_process import BenchProcess
from .genai import context_length
from .provider import provider_named
from .seq2seq import is_seq2seq
from .vision_language import is_vision_language

PROMPT_LENGTHS = (128, 512, 2048)
DECODE_PASTS = (128, 2048)
SAMPLES, FRAMES = (16_000, 160_000), (100, 1000)  # a second and ten of sound, as most models have it
# Steps go in turns of their own: a prompt takes seconds, in which the speed of a machine changes.
DECODE_TURNS, STEPS_IN_A_TURN = 4, 8
DECODE_STEPS = DECODE_TURNS * STEPS_IN_A_TURN

_Job = tuple[int, int] | None  # rows and tokens to run; None: to load


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
        samples: seconds of every repeat: "load", "prefill:{length}", "decode:{past}" (of each repeat several, medians
            of the steps of a turn), and with "x{rows}" at the end those of batches.
        spread: for each key of `samples` the interquartile range of the seconds over their median.
        batched: tokens a second of all rows of larger batches together, by keys of `samples`.
    """

    folder: str
    load_seconds: float
    prefill: dict[int, float]
    decode: dict[int, float]
    memory_bytes: int
    model_bytes: int
    samples: dict[str, list[float]]
    spread: dict[str, float]
    batched: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchResult:
    """Measurements, and how the first folder compares with the second where there is one.

    ratios: first / second of every quantity; above 1 is faster for "prefill:…" and "decode:…", and larger or slower for
    "load_seconds", "memory_bytes" and "model_bytes".
    notes: what was not measured as asked.
    """

    first: Measurement
    second: Measurement | None
    ratios: dict[str, float]
    threads: int | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    prompt_lengths: Sequence[int] | None = None,
    decode_pasts: Sequence[int] | None = None,
    batches: Sequence[int] = (),
    repeats: int = 5,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure a folder of a decoder, of qexport or of onnxruntime-genai's model builder, or one that has several parts.

    Of an encoder-decoder prompts are sources that are read up to the first token about them, and decoding is what
    follows; those of spectrograms are measured at the one length that they have. Of a model of pictures and text every
    prompt is a picture with so many tokens of text behind it.

    Args:
        folder: what is measured.
        against: another folder, measured in turns with the first.
        prompt_lengths: by default 128, 512 and 2048 tokens, or what the model's context holds of them.
        decode_pasts: tokens in the cache when decoding; by default 128 and 2048, or what the context holds.
        batches: how many prompts of the same length are read and continued at once, besides one alone.
        repeats: measurements of everything.
        threads: threads within an operator; None: every physical core, as everywhere.
        provider: run on this provider instead of the one the file was made for.
        progress: called with (stage, what, done, total).

    Raises: as `measure`.
    """
    folders = [Path(path) for path in (folder, against) if path is not None]
    measured, notes = measure(
        folders, prompt_lengths=prompt_lengths, decode_pasts=decode_pasts, batches=batches, repeats=repeats,
        threads=threads, provider=provider, progress=progress,
    )  # fmt: skip
    second = measured[1] if len(measured) > 1 else None
    return BenchResult(measured[0], second, ratios(measured[0], second) if second else {}, threads, notes)


def measure(
    folders: Sequence[Path],
    *,
    prompt_lengths: Sequence[int] | None = None,
    decode_pasts: Sequence[int] | None = None,
    batches: Sequence[int] = (),
    repeats: int = 5,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Measurement], tuple[str, ...]]:
    """Measure any number of folders in one run; see `bench`.

    Each folder has a process of its own, so that memory and load time are its own; the repeats go through the folders
    there and back (A B B A), so that a change in the machine's speed meets all of them alike, and so do the steps
    behind the prompts of one repeat, some at a time. Tokens are random, sampling is not timed.

    Returns:
        a measurement for each folder, and notes on what was not measured as asked.

    Raises:
        InputError: a folder is no decoder, no provider is called so, the numbers asked for are not positive, or more
            tokens than a model reads.
        RuntimeProblem: a folder does not load or run, or its process dies.
    """
    counts = [repeats, *(prompt_lengths or ()), *(decode_pasts or ()), *batches, 1 if threads is None else threads]
    if min(counts) < 1:
        raise InputError("prompt lengths, pasts, batches, repeats and threads are 1 or more")
    provider = None if provider is None else provider_named(provider)
    plans = [_describe(path) for path in folders]
    prompts, pasts, notes = _fitting(folders, prompt_lengths, decode_pasts)
    slower = [(path, plan.numerics.get("slower_than_float")) for path, plan in zip(folders, plans, strict=True)]
    notes += tuple(f"{path}: {sentence}" for path, sentence in slower if sentence)
    longest = max([*prompts, *(past + DECODE_STEPS for past in pasts)], default=1)
    jobs: list[_Job] = [None]
    jobs += [(rows, tokens) for rows in sorted({1, *batches}) for tokens in sorted({*prompts, *pasts})]
    processes: list[BenchProcess] = []
    samples: list[dict[str, list[float]]] = [{} for _ in folders]
    try:
        for path, plan in zip(folders, plans, strict=True):
            processes.append(BenchProcess(path, plan, threads, provider, longest))
        turns = [(job, turn) for job in jobs for turn in range(repeats + 1)]
        for done, (job, turn) in enumerate(turns):
            progress("measure", _named(job), done, len(turns))
            found = _turn(processes if turn % 2 else processes[::-1], job, prompts, pasts)
            if turn:  # the first turn warms caches and memory up
                for process, kept in zip(processes, samples, strict=True):
                    for key, seconds in found[process].items():
                        kept.setdefault(key, []).extend(seconds)
        progress("measure", "", len(turns), len(turns))
        memory = [process.memory() for process in processes]
    finally:
        for process in processes:
            process.close()
    return [_summarize(*parts) for parts in zip(folders, plans, samples, memory, strict=True)], notes


def ratios(first: Measurement, second: Measurement) -> dict[str, float]:
    """first / second of every quantity; see `BenchResult`."""
    found = {
        name: getattr(first, name) / max(getattr(second, name), 1e-12)
        for name in ("load_seconds", "memory_bytes", "model_bytes")
    }
    found |= {f"prefill:{n}": rate / second.prefill[n] for n, rate in first.prefill.items()}
    found |= {f"decode:{n}": rate / second.decode[n] for n, rate in first.decode.items()}
    return found | {key: rate / second.batched[key] for key, rate in first.batched.items()}


def _describe(folder: Path) -> Manifest:
    if is_seq2seq(folder):
        decoder = manifests.load(folder / DECODER)
        size = manifests.stated(folder).get("vocab_size")
        return decoder.model_copy(update={"settings": decoder.settings | {"vocab_size": size or 1}})
    if is_vision_language(folder):
        return manifests.load(folder / DECODER)
    plan = manifests.load_any(folder)
    if plan.kind != "decoder":
        raise InputError(f"this export is a {plan.kind}, but bench measures decoders", place=str(folder))
    return plan


def _fitting(
    folders: Sequence[Path], prompt_lengths: Sequence[int] | None, decode_pasts: Sequence[int] | None
) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Prompt lengths and pasts that every model reads, and a note where the defaults had to be shortened."""
    context, place = min(
        ((length, str(path)) for path in folders if (length := context_length(path)) is not None),
        default=(None, ""),
    )
    pairs = _of_one_kind(folders, is_seq2seq, "an encoder-decoder")
    sees = _of_one_kind(folders, is_vision_language, "a model of pictures and text")
    if (sound := _sound(folders)) is not None:
        return _of_sound(sound, folders, prompt_lengths, decode_pasts)
    room = {"a prompt of": context, f"decoding {DECODE_STEPS} tokens after": context and context - DECODE_STEPS}
    kept, notes = [], []
    for (what, limit), given, default in zip(
        room.items(), (prompt_lengths, decode_pasts), (PROMPT_LENGTHS, DECODE_PASTS), strict=True
    ):
        lengths = list(default if given is None else given)
        if limit is not None and (over := [n for n in lengths if n > limit]):
            if given is not None:
                raise InputError(
                    f"{what} {over[0]} tokens does not fit: the model reads {context}", place=place,
                    remedy=f"Ask for {limit} or fewer" if limit > 0 else "Ask for a prompt only",
                )  # fmt: skip
            lengths = sorted({min(n, limit) for n in lengths if limit > 0})
            notes.append(f"{what} {over[0]} tokens became {limit}: the model reads {context}")
        kept.append(lengths)
    if sees:
        notes.append("every prompt is a picture and so many tokens of text behind it, of which the speed is")
    if pairs:
        notes.append("prompts are sources, up to the first token about them; decoding is about such sources")
    return kept[0], kept[1], tuple(notes)


def _of_one_kind(folders: Sequence[Path], is_one: Callable[[Path], bool], what: str) -> bool:
    """Whether all are of a kind.

    Raises:
        InputError: some are, which do something else than the others.
    """
    kinds = [is_one(path) for path in folders]
    if any(kinds) and not all(kinds):
        raise InputError(
            f"{what} is measured beside others", place=str(folders[kinds.index(False)]),
            remedy="Compare exports of one kind",
        )  # fmt: skip
    return any(kinds)


def _of_sound(
    dims: tuple[int | str, ...], folders: Sequence[Path], prompt_lengths: Sequence[int] | None,
    decode_pasts: Sequence[int] | None,
) -> tuple[list[int], list[int], tuple[str, ...]]:  # fmt: skip
    """The same of sources of sound, with these dimensions."""
    if all(isinstance(size, int) for size in dims[1:]):
        frames, pictures = int(dims[-1]), len(dims) > 3
        what = f"pictures of {dims[-2]} x {frames} pixels" if pictures else f"spectrograms of {frames} frames"
        if prompt_lengths or decode_pasts:
            raise InputError(
                f"it reads {what}, and no others", place=str(folders[0]), remedy="Leave out the lengths"
            )
        note = f"prompts are {what}, up to the first token"
        return [frames], [frames], (note,)
    lengths, unit = (SAMPLES, "samples") if len(dims) == 2 else (FRAMES, "frames")
    note = f"prompts are sources of so many {unit}, up to the first token about them; decoding is about such sources"
    # What was heard is as long as it is, whatever has been written about it.
    return list(prompt_lengths or lengths), list(decode_pasts or lengths[:1]), (note,)


def _sound(folders: Sequence[Path]) -> tuple[int | str, ...] | None:
    """Dimensions of the sources of encoder-decoders of sound; None of anything else.

    Raises:
        InputError: they differ.
    """
    found = set()
    for folder in filter(is_seq2seq, folders):
        inputs = manifests.load(folder / ENCODER).settings.get("inputs", {})
        name = next(iter(inputs.keys() - {"attention_mask"}), "input_ids")
        found.add(None if name == "input_ids" else tuple(inputs[name]))
    if len(found) > 1:
        raise InputError(
            "they read sources of different kinds", place=str(folders[0]), remedy="Measure them separately"
        )
    return found.pop() if found else None


def _places(folder: Path) -> tuple[Path, ...]:
    """Where the files of an export are."""
    if is_seq2seq(folder):
        return (folder / ENCODER, folder / DECODER)
    return tuple(folder / part for part in PICTURE_PARTS) if is_vision_language(folder) else (folder,)


def _named(job: _Job) -> str:
    if job is None:
        return "load"
    rows, tokens = job
    return f"{tokens} tokens" if rows == 1 else f"{rows} x {tokens} tokens"


def _turn(
    processes: Sequence[BenchProcess], job: _Job, prompts: Sequence[int], pasts: Sequence[int]
) -> dict[BenchProcess, dict[str, list[float]]]:
    """Seconds of one turn of a job, of every process by key of `Measurement.samples`."""
    if job is None:
        return {process: {"load": [process.load()]} for process in processes}
    rows, tokens = job
    key = str(tokens) if rows == 1 else f"{tokens}x{rows}"
    read = {process: process.prefill(tokens, rows) for process in processes}
    found = {process: {f"prefill:{key}": [read[process]]} if tokens in prompts else {} for process in processes}
    for turn in range(DECODE_TURNS if tokens in pasts else 0):
        for process in processes if turn % 2 else processes[::-1]:
            found[process].setdefault(f"decode:{key}", []).append(process.decode(STEPS_IN_A_TURN))
    return found


def _tokens(key: str) -> int:
    """How many tokens a batch reads or writes in the seconds of its key."""
    what, sizes = key.split(":")
    tokens, rows = map(int, sizes.split("x"))
    return rows * tokens if what == "prefill" else rows


def _summarize(folder: Path, plan: Manifest, samples: dict[str, list[float]], memory: int) -> Measurement:
    middle = {key: float(np.median(values)) for key, values in samples.items()}
    quartiles = {key: np.percentile(values, [25, 75]) for key, values in samples.items()}

    def times(what: str) -> dict[int, float]:
        keys = [key for key in middle if key.startswith(what) and "x" not in key]
        return {int(key.split(":")[1]): middle[key] for key in keys}

    batched = {key: _tokens(key) / seconds for key, seconds in middle.items() if "x" in key}

    name = plan.settings.get("filename", manifests.MODEL_FILE)
    return Measurement(
        folder=str(folder),
        load_seconds=middle["load"],
        prefill={n: n / seconds for n, seconds in times("prefill").items()},
        decode={n: 1 / seconds for n, seconds in times("decode").items()},
        batched=batched,
        memory_bytes=memory,
        model_bytes=sum(
            path.stat().st_size
            for place in _places(folder)
            for path in place.glob(f"{name}*") if path.is_file()
        ),
        samples=samples,
        spread={key: float(high - low) / middle[key] for key, (low, high) in quartiles.items()},
    )
