"""What to take, and what temperature changes: sentences that follow from the texts by a rule, not from expectations.

A difference is called clear when it is more than three of its standard errors, taken over the prompts that both sides
have, and more than rounding. With few prompts that is no more than a sign, and many comparisons are made: more prompts
make it firmer.
"""

from collections.abc import Mapping, Sequence

from ..formatting import megabytes
from .result import BestFormat, StudyRow
from .summary import Group, Key, TextMeasures, differences, mean_and_error

_ERRORS = 3
_LEAST = 1e-3  # smaller differences are the rounding of float32, and show in no digit that is printed
# What a text may have more or less of than the float model's own.
_CHANGES = {
    "perplexity_ratio": "perplexity",
    "repetition_change": "repeated 4-grams",
    "distinct_1_change": "distinct-1",
    "distinct_2_change": "distinct-2",
}


def is_clear(mean: float | None, error: float | None) -> bool:
    """Whether a difference is more than three standard errors and than rounding away from 0; never without an error."""
    return mean is not None and error is not None and abs(mean) > max(_ERRORS * error, _LEAST)


def choices(measured: TextMeasures, sizes: Mapping[str, int], length: int) -> list[BestFormat]:
    """For every setting the exports that are worth their size, smallest first.

    The smallest export is the first; each that is clearly closer to the float model than the last choice is the next.

    Args:
        measured: texts of `length` tokens.
        sizes: model bytes of the exports by name.
    """
    found = []
    for temperature, top_k in sorted({key[1:] for key in measured.keys}):

        def distance(name: str, setting=(temperature, top_k)) -> Group:
            return measured.values((name, *setting), "distance")

        last: str | None = None
        for name in sorted(sizes, key=lambda name: (sizes[name], mean_and_error(distance(name))[0])):
            gain, gain_error = mean_and_error(differences(distance(last), distance(name)) if last else {})
            if last is None or (gain is not None and gain > 0 and is_clear(gain, gain_error)):
                mean, error = mean_and_error(distance(name))
                found.append(BestFormat(
                    temperature=temperature, top_k=top_k, max_new_tokens=length, format=name, model_bytes=sizes[name],
                    distance=mean, distance_error=error, gain=gain, gain_error=gain_error,
                ))  # fmt: skip
                last = name
    return found


def conclude(
    chosen: Sequence[BestFormat],
    rows: Sequence[StudyRow],
    measured: TextMeasures,
    sizes: Mapping[str, int],
    length: int,
) -> list[str]:
    """All sentences.

    Args:
        chosen: choices of every length; rows: all.
        measured: texts of `length` tokens, the longest; sizes: model bytes of the exports by name.
    """
    if all(row.distance_error is None for row in rows):
        return ["one text of each format has no spread, so nothing can be called clear: give more prompts or seeds"]
    found = _takings(chosen, sizes)
    for name in sizes:
        settings = [key for key in measured.keys if key[0] == name]
        for top_k in sorted({k for _, temperature, k in settings if temperature}) or [0]:
            keys = sorted(key for key in settings if key[2] == top_k or not key[1])
            found.append(_sensitivity(name, top_k, keys, measured, rows, length))
    return found


def _takings(chosen: Sequence[BestFormat], sizes: Mapping[str, int]) -> list[str]:
    by_setting: dict[tuple[float, int, int], list[BestFormat]] = {}
    for choice in chosen:
        by_setting.setdefault((choice.temperature, choice.top_k, choice.max_new_tokens), []).append(choice)
    sentences = []
    for (temperature, top_k, length), (first, *better) in by_setting.items():
        setting = f"temperature {temperature:g}{'' if not temperature else ', ' + _top_k(top_k)}, {length} new tokens"
        parts = [f"smallest is {first.format} ({megabytes(first.model_bytes)}), distance {_with_error(first)}"]
        parts += [
            f"{c.format} ({megabytes(c.model_bytes)}) is clearly closer, distance {_with_error(c)}" for c in better
        ]
        names = {first.format, *(c.format for c in better)}
        if others := [name for name in sizes if name not in names]:
            parts.append(f"not clearly closer than a smaller one: {', '.join(others)}")
        sentences.append(f"{setting}: {'; '.join(parts)}")
    return sentences


def _sensitivity(
    name: str, top_k: int, keys: Sequence[Key], measured: TextMeasures, rows: Sequence[StudyRow], length: int
) -> str:
    """How far one format is from the float model at each temperature, and what else its texts show."""
    by_temperature = {key[1]: measured.values(key, "distance") for key in keys}
    means = {t: mean_and_error(values) for t, values in by_temperature.items()}
    listed = ", ".join(f"{_number(*found)} at {t:g}" for t, found in means.items())
    sentence = f"{name}, {_top_k(top_k)}: distance {listed}"
    if len(means) > 1:
        plain = {t: mean or 0.0 for t, (mean, _) in means.items()}
        low, high = min(plain, key=plain.__getitem__), max(plain, key=plain.__getitem__)
        rise = mean_and_error(differences(by_temperature[high], by_temperature[low]))
        sentence += f"; clearly more at {high:g} than at {low:g}" if is_clear(*rise) else "; no clear change"
    found = {(row.temperature, row.top_k): row for row in rows if row.format == name and row.max_new_tokens == length}
    changes = [
        f"{what} {_change(measure, getattr(row, measure), getattr(row, f'{measure}_error'))} at {key[1]:g}"
        for measure, what in _CHANGES.items()
        for key in keys
        if _differs(row := found[key[1:]], measure)
    ]
    told = "; ".join(changes) if changes else "nothing clear in perplexity, repetition or distinct n-grams"
    return f"{sentence}. Its texts beside the float model's: {told}"


def _differs(row: StudyRow, measure: str) -> bool:
    value, neutral = getattr(row, measure), 1 if measure == "perplexity_ratio" else 0
    return value is not None and is_clear(value - neutral, getattr(row, f"{measure}_error"))


def _change(measure: str, value: float, error: float) -> str:
    return f"x {value:.2f} ± {error:.2f}" if measure == "perplexity_ratio" else f"{value:+.3f} ± {error:.3f}"


def _with_error(choice: BestFormat) -> str:
    return _number(choice.distance, choice.distance_error)


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _top_k(top_k: int) -> str:
    return f"top-k {top_k}" if top_k else "top-k off"
