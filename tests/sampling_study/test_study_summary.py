"""Rows and conclusions from texts that were made up, so that every number and every word is known."""

import math

import numpy as np
import pytest

from qexport.sampling_study.conclusions import choices, conclude, is_clear
from qexport.sampling_study.grid import Draw
from qexport.sampling_study.summary import TextMeasures, mean_and_error, rows
from qexport.sampling_study.texts import Sample

GREEDY = Draw(0.0, 0, 0)


def sample(name, prompt, draw, tokens, *, distance=0.0, nll=1.0, seconds=0.1):
    return Sample(
        name, prompt, draw, tuple(tokens), (seconds,) * (len(tokens) - 1), np.full(len(tokens), nll),
        np.full(len(tokens), distance),
    )  # fmt: skip


def own(prompts, draws=(GREEDY,), tokens=(1, 2, 3, 4, 5, 6)):
    return [sample("float", p, d, tokens) for d in draws for p in range(prompts)]


def test_the_error_is_that_of_a_mean():
    assert mean_and_error({}) == (None, None) and mean_and_error({0: 3.0}) == (3.0, None)
    mean, error = mean_and_error({0: 1.0, 1: 2.0, 2: 6.0})
    assert mean == 3 and error == pytest.approx(math.sqrt(7) / math.sqrt(3))  # s squared is (4 + 1 + 9) / 2


def test_texts_of_one_prompt_are_one_observation():
    draws = [Draw(1.0, 0, seed) for seed in (0, 1)]
    texts = own(2, draws) + [
        sample("q", prompt, draw, [1, 2, 3, 4, 5, 6], distance=distance)
        for prompt, distances in enumerate([(0.1, 0.3), (0.4, 0.8)])
        for draw, distance in zip(draws, distances, strict=True)
    ]
    row = rows({6: TextMeasures(texts, "float", 6)}, ["float", "q"])[1]
    assert (row.format, row.texts) == ("q", 4)
    assert row.distance == pytest.approx(0.4) and row.distance_error == pytest.approx(0.2)  # of 0.2 and 0.6
    alone = TextMeasures([t for t in texts if t.prompt == 0], "float", 6)  # one prompt: its seeds are the observations
    row = rows({6: alone}, ["float", "q"])[1]
    assert row.distance == pytest.approx(0.2) and row.distance_error == pytest.approx(0.1)


def test_every_cell_of_a_row():
    texts = [sample("float", 0, GREEDY, [1, 2, 3, 4, 5, 6], nll=1.0), sample("float", 1, GREEDY, [1, 2], nll=2.0)]
    texts += [
        sample("q", 0, GREEDY, [1, 2, 9, 9, 9, 9, 9], distance=0.5, nll=1.5, seconds=0.1),
        sample("q", 1, GREEDY, [1, 2, 8], distance=0.1, nll=2.0, seconds=0.2),
    ]
    long, short = rows({7: TextMeasures(texts, "float", 7), 2: TextMeasures(texts, "float", 2)}, ["float", "q"])[1::2]
    assert (long.temperature, long.top_k, long.max_new_tokens, short.max_new_tokens) == (0, 0, 7, 2)
    assert long.prefix_tokens == 2 and long.prefix_share == pytest.approx((2 / 7 + 2 / 3) / 2)
    assert long.token_agreement == long.prefix_share and long.new_tokens == 5
    assert long.perplexity == pytest.approx(math.exp(1.75)) and long.perplexity_ratio == pytest.approx(math.exp(0.25))
    assert long.perplexity_error == pytest.approx(math.exp(1.75) * 0.25)
    assert long.repetition == pytest.approx(1 / 4) and long.repetition_error is None  # the other text is too short
    assert long.repetition_change == pytest.approx(1 / 4)
    assert long.distinct_1 == pytest.approx((3 / 7 + 1) / 2)
    assert long.distinct_1_change == pytest.approx((3 / 7 - 1 + 0) / 2)
    assert long.distinct_2 == pytest.approx((3 / 6 + 1) / 2)
    assert long.tokens_per_second == pytest.approx(7.5) and long.tokens_per_second_spread == pytest.approx(2.5 / 7.5)
    # Of the first two tokens both formats have the same.
    assert short.prefix_share == 1 and short.prefix_tokens == 2 and short.repetition is None


def test_clear_is_more_than_three_errors():
    assert is_clear(0.31, 0.1) and is_clear(-0.31, 0.1) and is_clear(0.1, 0.0)
    assert not is_clear(1e-4, 1e-6)  # rounding, however steady
    assert not is_clear(0.3, 0.1) and not is_clear(5.0, None) and not is_clear(None, None) and not is_clear(0.0, 0.0)


def made(distances):
    """Texts of formats whose distances are given: {name: a distance for each prompt}."""
    texts = own(len(next(iter(distances.values()))))
    for name, values in distances.items():
        texts += [sample(name, p, GREEDY, [1, 2, 3, 4, 5, 6], distance=d) for p, d in enumerate(values)]
    return texts


def chosen(distances, sizes):
    return [c.format for c in choices(TextMeasures(made(distances), "float", 6), sizes, 6)]


def test_what_to_take_is_the_smallest_and_whatever_is_clearly_closer():
    sizes = {"small": 10, "large": 20}
    near, far = [0.10, 0.11, 0.12, 0.10], [0.30, 0.31, 0.33, 0.30]
    assert chosen({"small": far, "large": near}, sizes) == ["small", "large"]
    assert chosen({"small": near, "large": far}, sizes) == ["small"]
    # Of two of one size the closer one.
    assert chosen({"a": far, "b": near}, {"a": 10, "b": 10}) == ["b"]
    # A lower mean with prompts that contradict each other decides nothing.
    mixed = [0.02, 0.60, 0.01, 0.40]
    assert chosen({"small": far, "large": mixed}, sizes) == ["small"]
    # Each is held against the last choice, not against the smallest alone.
    closest = [0.09, 0.12, 0.11, 0.11]
    assert chosen({"small": far, "large": near, "largest": closest}, sizes | {"largest": 30}) == ["small", "large"]


def test_the_gain_is_that_of_pairs():
    found = choices(TextMeasures(made({"s": [0.2, 0.6], "l": [0.1, 0.5]}), "float", 6), {"s": 1, "l": 2}, 6)
    assert [c.gain for c in found] == [None, pytest.approx(0.1)] and found[1].gain_error == pytest.approx(0, abs=1e-12)
    assert found[1].distance == pytest.approx(0.3) and found[1].distance_error == pytest.approx(0.2)


def sentences(texts, sizes):
    measured = TextMeasures(texts, "float", 6)
    table = rows({6: measured}, ["float", *sizes])
    return conclude(choices(measured, sizes, 6), table, measured, sizes, 6)


def test_sentences_say_what_the_numbers_say():
    warm = Draw(0.8, 50, 0)
    texts = own(3, (GREEDY, warm))
    for prompt, noise in enumerate((0.0, 0.01, 0.02)):
        texts.append(sample("q", prompt, GREEDY, [1, 2, 3, 4, 5, 6], distance=0.1 + noise))
        texts.append(sample("q", prompt, warm, [1, 2, 3, 4, 5, 6], distance=0.4 + 2 * noise, nll=1.5 + noise))
        texts += [sample("big", prompt, draw, [1, 2], distance=0.1 + noise) for draw in (GREEDY, warm)]
    take_cold, take_warm, sensitive, _ = sentences(texts, {"q": 2_000_000, "big": 9_000_000})
    assert take_cold == (
        "temperature 0, 6 new tokens: smallest is q (2.0 MB), distance 0.110 ± 0.006; "
        "not clearly closer than a smaller one: big"
    )
    assert take_warm == (
        "temperature 0.8, top-k 50, 6 new tokens: smallest is q (2.0 MB), distance 0.420 ± 0.012; "
        "big (9.0 MB) is clearly closer, distance 0.110 ± 0.006"
    )
    assert sensitive == (
        "q, top-k 50: distance 0.110 ± 0.006 at 0, 0.420 ± 0.012 at 0.8; clearly more at 0.8 than at 0. "
        "Its texts beside the float model's: perplexity x 1.67 ± 0.01 at 0.8"
    )


def test_one_text_proves_nothing_and_the_sentence_says_so():
    texts = [*own(1), sample("q", 0, GREEDY, [1, 9, 9, 9, 9, 9], distance=0.9)]
    (only,) = sentences(texts, {"q": 1})
    assert "nothing can be called clear" in only and "more prompts or seeds" in only
