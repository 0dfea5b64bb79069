"""Guessed tokens change how often the decoder is called, and nothing else."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qexport
from helpers.onnx_decoder import write_talking_decoder, write_tiny_decoder
from qexport.artifact.manifest import LinearEntry, Manifest
from qexport.errors import InputError
from qexport.runtime import drafts
from qexport.runtime.decoder import open_decoder
from qexport.runtime.drafts import Draft, Drafts, Lookup, Stakes
from qexport.runtime.row_cost import EXACT_NBITS, FLOAT, NBITS, OF_KERNEL, UNKNOWN, RowCost, row_cost
from qexport.runtime.sampling import Sampling, probabilities

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
CHI_SQUARE_26 = 54.1  # of 26 degrees of freedom, exceeded once in 1,000


@pytest.fixture(scope="module", params=[False, True], ids=["separate cache", "shared cache"])
def decoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    write_tiny_decoder(folder, up_scheme="float", shared_cache=request.param)
    return open_decoder(folder, threads=1, max_length=256)


@pytest.fixture
def kind(monkeypatch):
    """A kind of draft for one test, from a function of tokens and count."""

    def register(guess):
        class Guessing(Draft):
            def __init__(self):
                self.tokens = []

            def extend(self, tokens):
                self.tokens += tokens

            def guess(self, count):
                return 1, guess(self.tokens, count)

        monkeypatch.setitem(drafts.KINDS, "of a test", Guessing)
        return "of a test"

    return register


def write(decoder, guesses=None, **options):
    return decoder.generate([PROMPT], max_new_tokens=60, drafts=guesses, **options)


def test_text_is_the_one_without_drafts_in_fewer_calls(decoder):
    plain, drafted = write(decoder), write(decoder, Drafts())
    assert drafted.tokens == plain.tokens and plain.calls == 59
    assert drafted.calls < 50 and drafted.calls + drafted.right == 59 and drafted.right <= drafted.guessed


def test_right_guesses_are_all_taken_and_wrong_ones_leave_no_trace(decoder, kind):
    plain = write(decoder)
    text = [*PROMPT, *plain.tokens[0]]
    oracle = kind(lambda tokens, count: text[len(tokens) : len(tokens) + count])
    found = write(decoder, Drafts(oracle, rows=6))
    assert found.tokens == plain.tokens and found.calls == 10  # 59 tokens, six a call
    liar = kind(lambda tokens, count: [(token + 1) % 97 for token in text[len(tokens) : len(tokens) + count]])
    found = write(decoder, Drafts(liar, rows=6))
    assert found.tokens == plain.tokens and found.calls == 59 and found.right == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_bits_of_a_call_do_not_depend_on_what_is_guessed(decoder, seed):
    random = np.random.default_rng(seed)
    kept = []
    for tail in random.integers(3, 97, (2, 3)):
        decoder.reset()
        decoder.run(np.array([PROMPT]))
        kept.append(decoder.run(np.array([[11, *tail]]))[0, 0].copy())
        decoder.cut(len(PROMPT) + 1)
        kept.append(decoder.run(np.array([[12, *tail]]))[0, 0].copy())
    np.testing.assert_array_equal(kept[0], kept[2])
    np.testing.assert_array_equal(kept[1], kept[3])


def test_the_same_seed_draws_the_same_tokens_whatever_is_guessed(decoder, kind):
    sampling = Sampling(temperature=1.5, top_k=20, seed=5)
    plain = write(decoder, sampling=sampling)
    some = kind(lambda tokens, count: [tokens[-1]] * count)
    for guesses in (Drafts(), Drafts(rows=4), Drafts(some), Drafts(some, rows=4)):
        assert write(decoder, guesses, sampling=sampling).tokens == plain.tokens


def test_draws_follow_the_distribution_of_the_decoder(tmp_path, kind):
    """Of three tokens, over 1,500 seeds, by chi-square; the likeliest one is guessed in every place."""
    write_tiny_decoder(tmp_path, layers=1, vocab=3, up_scheme="float")
    decoder, prompt, seeds = open_decoder(tmp_path, threads=1), (1, 2, 0, 1), 1500

    def distribution(*tokens):
        decoder.reset()
        return probabilities(decoder.run(np.array([tokens]))[0, -1].copy(), Sampling(temperature=2.0))

    likely = {}
    for a, b, c in product(range(3), repeat=3):
        likely[a, b, c] = distribution(*prompt)[a] * distribution(*prompt, a)[b] * distribution(*prompt, a, b)[c]
    best = [int(distribution(*prompt, a).argmax()) for a in range(3)]
    guesses = Drafts(kind(lambda tokens, count: [best[tokens[-1]]] * count), rows=2)
    found, right = dict.fromkeys(likely, 0), 0
    for seed in range(seeds):
        sampling = Sampling(temperature=2.0, seed=seed)
        made = decoder.generate([prompt], max_new_tokens=3, drafts=guesses, sampling=sampling)
        found[made.tokens[0]] += 1
        right += made.right
    assert 0.2 * seeds < right < 0.9 * seeds and min(likely.values()) * seeds > 2
    assert sum((found[text] - p * seeds) ** 2 / (p * seeds) for text, p in likely.items()) < CHI_SQUARE_26


def test_text_ends_at_its_end_of_sequence_token_within_a_guess(decoder):
    free = write(decoder).tokens[0]
    stop = free[30]
    seen = []
    found = write(decoder, Drafts(rows=8), eos_token_ids=[stop], on_token=lambda row, token: seen.append(token))
    assert found.tokens == (free[: free.index(stop) + 1],) and found.finished == (True,)
    assert tuple(seen) == found.tokens[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_no_more_tokens_than_asked_for(decoder, count):
    for guesses in (Drafts(), Drafts(rows=8)):
        assert len(decoder.generate([PROMPT], max_new_tokens=count, drafts=guesses).tokens[0]) == count


def test_a_cut_cache_is_the_cache_of_the_shorter_text(decoder):
    decoder.reset()
    decoder.run(np.array([[5, 6, 7]]))
    expected = decoder.run(np.array([[8]])).copy()
    decoder.run(np.array([[20, 21, 22]]))
    decoder.cut(3)
    assert decoder.past == 3
    np.testing.assert_array_equal(decoder.run(np.array([[8]])), expected)
    with pytest.raises(InputError, match="5 of 4 tokens"):
        decoder.cut(5)


def test_lookup_guesses_what_followed_the_longest_run_where_it_stood_last():
    lookup = Lookup()
    lookup.extend([1, 2, 3, 9, 2, 3, 8, 7, 1, 2])
    assert lookup.guess(3) == (2, [3, 9, 2])
    lookup.extend([3])
    assert lookup.guess(4) == (3, [9, 2, 3, 8])  # behind 1 2 3, though 2 3 stood later
    lookup.extend([50])
    assert lookup.guess(4) == (0, [])


def test_lookup_goes_on_beyond_the_end_of_a_text_that_repeats_itself():
    lookup = Lookup()
    lookup.extend([1, 2, 3, 1, 2, 3, 1, 2])
    assert lookup.guess(7) == (5, [3, 1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize("row", [RowCost(0.0, 0.34), RowCost(0.0, 0.15), RowCost(1.1, 0.1)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_stakes_lose_less_than_three_hundredths_and_win_where_guesses_are_right(share, row):
    stakes, random, cost, written = Stakes(row), np.random.default_rng(0), 0.0, 0
    first = row.of(3) if row.first else row.of(1)
    while written < 400:
        count = stakes.guesses(3)
        right = int(np.cumprod(random.random(count) < share).sum())
        stakes.note(3, count, right)
        cost, written = cost + 1 + row.of(count), written + right + 1
        assert count == 0 or count % 2
        assert cost <= 1.01 * written + first
        assert written < (70 if row.first else 12) or written / cost >= 0.97
    pays = 0.9 if row.first else 0.5  # a share of 0.5 wins less than one token, however many are guessed
    assert written / cost > (0.97 if share < pays else 1.02 if share == 0.5 else 1.4)


def test_stakes_learn_from_what_was_not_given():
    stakes = Stakes()
    for _ in range(40):
        stakes.learn(2, False, read=1)
    assert stakes.guesses(2) == stakes.guesses(5) == 0
    for _ in range(3):
        stakes.note(5, 0, 0)
        stakes.learn(5, True)
    assert stakes.guesses(5) == 1 and stakes.guesses(2) == 0


def test_what_drafts_cannot_do_is_an_input_error(decoder, tmp_path):
    with pytest.raises(InputError, match="drafts are for one text"):
        decoder.generate([[5], [6]], max_new_tokens=2, drafts=Drafts())
    with pytest.raises(InputError, match="there is no draft called 'oracle'"):
        Drafts("oracle")
    with pytest.raises(InputError, match="not an even number"):
        Drafts(rows=3)
    write_tiny_decoder(tmp_path, layers=1, last_logits=True)
    with pytest.raises(InputError, match="only the logits of the last token"):
        open_decoder(tmp_path, threads=1).generate([[5]], max_new_tokens=2, drafts=Drafts())


def test_command_line_and_conversation_take_drafts(run, tmp_path):
    folder = write_talking_decoder(tmp_path, "{{ messages[-1]['content'] }}", 40)
    texts = [
        run("generate", folder, "-p", "abcabcab", "--max-new-tokens", "24", *options)
        for options in ((), ("--draft", "lookup"), ("--draft", "lookup", "--draft-rows", "4"))
    ]
    assert len({out for _, out, _ in texts}) == 1 and [code for code, _, _ in texts] == [0, 0, 0]
    code, _, err = run("generate", folder, "-p", "a", "--draft-rows", "4")
    assert code == 2 and "Pass --draft lookup too" in err
    answers = [qexport.Chat(folder, drafts=kind).say("abcabcab") for kind in (None, Drafts(), Drafts(rows=4))]
    assert answers[0][: len(answers[2])] == answers[2] and answers[0] == answers[1]


def entry(name, kernel, size, output="x", **more):
    return LinearEntry(name=name, scheme="s", output=output, node=name, kernel=kernel, shape=(8, 8), bytes=size, **more)


def row_cost_of(*entries, level="4", sizes=(("embedding", 100), ("lm_head", 0), ("rest", 0)), **more):
    session = {"session.qdq_matmulnbits_accuracy_level": level}
    return row_cost(
        Manifest(target="cpu", kind="decoder", linears=entries, session=session, bytes=dict(sizes), **more)
    )


def test_what_a_row_costs_follows_from_the_bytes_of_each_kernel():
    nbits, int8, floats = (OF_KERNEL[kernel].each for kernel in (NBITS, "MatMulIntegerToFloat", FLOAT))
    down, head = entry("down", NBITS, 60), entry("lm_head", NBITS, 0, "logits")
    assert row_cost_of(down, head) == RowCost(0.0, pytest.approx(nbits))
    tied = row_cost_of(down)  # the head is in float and reads the table of embeddings
    assert tied == RowCost(0.0, pytest.approx((60 * nbits + 100 * floats) / 160))
    untied = (("embedding", 100), ("lm_head", 40), ("rest", 10))
    found = row_cost_of(entry("down", "MatMulIntegerToFloat", 60), sizes=untied)
    assert found == RowCost(0.0, pytest.approx((60 * int8 + 50 * floats) / 110))
    exact = row_cost_of(down, level="1")
    share = 60 * EXACT_NBITS.time / (60 * EXACT_NBITS.time + 100)
    assert exact.first == pytest.approx(share * EXACT_NBITS.first)
    assert exact.each == pytest.approx(share * EXACT_NBITS.each + (1 - share) * floats)
    assert row_cost_of(entry("e", "QMoE", 9)) == row_cost_of(down, sizes=()) == UNKNOWN
    assert row_cost_of(entry("down", NBITS, 60, prompt_kernel="MatMulIntegerToFloat")) == UNKNOWN
    assert row_cost_of(down, provider="CUDAExecutionProvider") == UNKNOWN
