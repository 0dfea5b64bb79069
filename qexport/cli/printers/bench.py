"""What `qexport bench` prints."""

from ...formatting import megabytes
from ...runtime.benchmark import BenchResult
from ..console import print_table


def print_bench(result: BenchResult) -> None:
    """Medians of one folder, or of two side by side with their ratio, in numbers and in words."""
    measured = [m for m in (result.first, result.second) if m is not None]
    rows = [
        [f"prompt of {n} tokens, tokens/s", *(f"{m.prefill[n]:,.1f}" for m in measured), _ratio(result, f"prefill:{n}")]
        for n in result.first.prefill
    ]
    rows += [
        [
            f"decoding after {n} tokens, tokens/s",
            *(f"{m.decode[n]:,.1f}" for m in measured),
            _ratio(result, f"decode:{n}"),
        ]
        for n in result.first.decode
    ]
    rows += [
        [_batched(key), *(f"{m.batched[key]:,.1f}" for m in measured), _ratio(result, key)]
        for key in result.first.batched
    ]
    rows += [
        ["load, seconds", *(f"{m.load_seconds:.2f}" for m in measured), _ratio(result, "load_seconds")],
        ["memory", *(megabytes(m.memory_bytes) for m in measured), _ratio(result, "memory_bytes")],
        ["file", *(megabytes(m.model_bytes) for m in measured), _ratio(result, "model_bytes")],
    ]
    columns = ["", *(m.folder for m in measured), "first/second"]
    if result.second is None:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows)
    print(f"{_threads(result.threads)}, medians")
    for note in result.notes:
        print(note)
    if result.second is not None:
        print(in_words(result))


def _batched(key: str) -> str:
    what, sizes = key.split(":")
    tokens, rows = sizes.split("x")
    what = f"prompts of {tokens} tokens" if what == "prefill" else f"decoding after {tokens} tokens"
    return f"{rows} at once: {what}, tokens/s"


def _threads(count: int | None) -> str:
    if count is None:
        return "a thread on every physical core"
    return f"{count} thread{'' if count == 1 else 's'}"


def in_words(result: BenchResult) -> str:
    """One sentence on how the first folder compares with the second."""

    def rates(kind: str) -> list[str]:
        found = {key.split(":")[1]: ratio for key, ratio in result.ratios.items() if key.startswith(f"{kind}:")}
        return [f"{ratio:.2f} times as fast with {n} tokens" for n, ratio in found.items()]

    parts = [f"reads a prompt {', '.join(rates('prefill'))}"] if rates("prefill") else []
    parts += [f"decodes {', '.join(rates('decode'))} in the cache"] if rates("decode") else []
    load, memory, size = (result.ratios[name] for name in ("load_seconds", "memory_bytes", "model_bytes"))
    parts.append(f"loads in {load:.2f} of the time, takes {memory:.2f} of the memory and {size:.2f} of the disk")
    other = "" if result.second is None else f" against {result.second.folder}"
    return f"{result.first.folder}{other}: {'; '.join(parts)}"


def _ratio(result: BenchResult, name: str) -> str:
    return f"{result.ratios[name]:.2f}" if name in result.ratios else ""
