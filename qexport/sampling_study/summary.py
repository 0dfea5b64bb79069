"""From texts to rows: means and standard errors over prompts and seeds."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .measures import common_prefix, distinct, prefix_share, repetition, token_agreement
from .result import StudyRow
from .texts import Sample

Key = tuple[str, float, int]  # format, temperature, top_k
Group = dict[int, float]  # of a measure: prompt, or seed where there is one prompt, to its mean

_CHANGES = ("repetition", "distinct_1", "distinct_2")


def mean_and_error(values: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean and its standard error, s / sqrt(n) with s from n - 1; None where there are too few values."""
    found = np.array(list(values.values()))
    if not len(found):
        return None, None
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> Group:
    """first - second where both have a value."""
    return {key: first[key] - second[key] for key in first.keys() & second.keys()}


class TextMeasures:
    """Every measure of every text, cut to one length.

    Args:
        samples: of all formats.
        reference: name of the float model's format, which has a text for every other.
        length: tokens; longer texts are cut.

    Attributes:
        keys: every format with every setting it wrote under.
        texts: how many, by key; speeds: of those with more than one token, steps a second.
    """

    def __init__(self, samples: Sequence[Sample], reference: str, length: int):
        own = {(s.prompt, s.draw): s for s in samples if s.format == reference}
        by_seed = len({s.prompt for s in samples}) == 1
        found: dict[Key, dict[str, dict[int, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        self.speeds: dict[Key, list[float]] = defaultdict(list)
        self.texts: dict[Key, int] = defaultdict(int)
        for sample in samples:
            key = (sample.format, sample.draw.temperature, sample.draw.top_k)
            self.texts[key] += 1
            if seconds := sample.seconds[: length - 1]:
                self.speeds[key].append(len(seconds) / sum(seconds))
            for name, value in _measures(sample, own[sample.prompt, sample.draw], length).items():
                found[key][name][sample.draw.seed if by_seed else sample.prompt].append(value)
        self.keys = tuple(found)
        self._found = {
            key: {name: {g: sum(v) / len(v) for g, v in groups.items()} for name, groups in names.items()}
            for key, names in found.items()
        }

    def values(self, key: Key, name: str) -> Group:
        """One measure of one format under one setting by prompt (by seed, where there is one prompt)."""
        return self._found[key].get(name, {})


def rows(measured: Mapping[int, TextMeasures], formats: Sequence[str]) -> list[StudyRow]:
    """A row for every length, setting and format, in this order.

    Args:
        measured: by length; formats: names in the order that rows shall have.
    """
    return [
        _row(found, key, length)
        for length, found in measured.items()
        for key in sorted(found.keys, key=lambda key: (key[1], key[2], formats.index(key[0])))
    ]


def _row(measured: TextMeasures, key: Key, length: int) -> StudyRow:
    cells: dict[str, float | None] = {}
    plain = ("distance", "prefix_share", "prefix_tokens", "token_agreement", "new_tokens", "repetition")
    for name in (*plain, "distinct_1", "distinct_2", *(f"{name}_change" for name in _CHANGES)):
        cells[name], cells[f"{name}_error"] = mean_and_error(measured.values(key, name))
    for name, logarithm in (("perplexity", "nll"), ("perplexity_ratio", "nll_change")):
        mean, error = mean_and_error(measured.values(key, logarithm))
        value = _exp(mean)
        cells[name] = value
        # The first term of its series: an error of a logarithm is one in shares.
        cells[f"{name}_error"] = None if error is None or value is None else value * error
    speeds = measured.speeds[key]
    if speeds:
        middle = float(np.median(speeds))
        low, high = np.percentile(speeds, [25, 75])
        cells |= {"tokens_per_second": middle, "tokens_per_second_spread": float(high - low) / middle}
    name, temperature, top_k = key
    return StudyRow(
        format=name, temperature=temperature, top_k=top_k, max_new_tokens=length, texts=measured.texts[key],
        **{"tokens_per_second": None, "tokens_per_second_spread": None} | cells,
    )  # fmt: skip


def _measures(sample: Sample, own: Sample, length: int) -> dict[str, float]:
    """All that one text has; what it is too short for is left out."""
    tokens, others = sample.tokens[:length], own.tokens[:length]
    found = {"nll": float(sample.nll[:length].mean())} | _of_tokens(tokens)
    theirs = {"nll": float(own.nll[:length].mean())} | _of_tokens(others)
    found |= {f"{n}_change": found[n] - theirs[n] for n in ("nll", *_CHANGES) if n in found and n in theirs}
    return found | {
        "distance": float(sample.distance[:length].mean()),
        "prefix_share": prefix_share(tokens, others),
        "prefix_tokens": common_prefix(tokens, others),
        "token_agreement": token_agreement(tokens, others),
        "new_tokens": len(tokens),
    }


def _of_tokens(tokens: Sequence[int]) -> dict[str, float]:
    found = {"repetition": repetition(tokens), "distinct_1": distinct(tokens, 1), "distinct_2": distinct(tokens, 2)}
    return {name: value for name, value in found.items() if value is not None}


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value) if value < 700 else math.inf
