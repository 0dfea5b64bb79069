"""Comparison metrics against sums written out, and their edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.quant import metrics
from qexport.quant.metrics import (
    by_stretch,
    cosine,
    kl_divergence,
    nll,
    separation,
    sqnr_db,
    top1_agreement,
    top_k_agreement,
    top_two_margin,
)

some = settings(max_examples=20, deadline=None)


def pair(seed, *shape, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(*shape, generator=generator) * 4
    return reference, reference + noise * torch.randn(*shape, generator=generator)


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(v - top) for v in row)) + top
    return [v - total for v in row]


@some
@given(st.integers(0, 2**32))
def test_sqnr_and_cosine_agree_with_sums(seed):
    reference, value = pair(seed, 3, 17)
    ref, val = reference.flatten().tolist(), value.flatten().tolist()
    signal = math.fsum(r * r for r in ref)
    noise = math.fsum((r - v) ** 2 for r, v in zip(ref, val, strict=True))
    dot = math.fsum(r * v for r, v in zip(ref, val, strict=True))
    assert sqnr_db(reference, value) == pytest.approx(10 * math.log10(signal / noise), rel=1e-12)
    assert cosine(reference, value) == pytest.approx(dot / math.sqrt(signal * math.fsum(v * v for v in val)), rel=1e-12)


def test_sqnr_and_cosine_at_the_edges():
    one, zero, broken = torch.ones(4), torch.zeros(4), torch.tensor([1.0, math.nan, 1.0, 1.0])
    assert sqnr_db(one, one) == sqnr_db(zero, zero) == math.inf and sqnr_db(zero, one) == -math.inf
    assert sqnr_db(one, zero) == 0 and math.isnan(sqnr_db(one, broken)) and math.isnan(sqnr_db(broken, one))
    assert cosine(zero, zero) == 1 and cosine(one, zero) == 0 and math.isnan(cosine(one, broken))
    assert cosine(one, -one) == -1 and cosine(one.half() * 60000, one.half()) == 1  # squares beyond float16


def test_sqnr_of_known_noise():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(100_000, generator=generator)
    noise = torch.randn(100_000, generator=generator) / 100
    assert sqnr_db(signal, signal + noise) == pytest.approx(40, abs=0.1)  # sampling error of 1e5 values


@some
@given(st.integers(0, 2**32), st.floats(1e-4, 5))
def test_kl_and_nll_agree_with_sums(seed, noise):
    reference, value = pair(seed, 3, 11, noise=noise)
    targets = [1, 10, 4]
    kl, loss = kl_divergence(reference, value), nll(value, torch.tensor(targets))
    assert kl.shape == loss.shape == (3,) and kl.dtype == torch.float64
    for i, target in enumerate(targets):
        p, q = log_softmax(reference[i].tolist()), log_softmax(value[i].tolist())
        expected = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        assert float(kl[i]) == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert float(loss[i]) == pytest.approx(-q[target], rel=1e-12)


def test_kl_of_small_differences_is_not_lost_to_rounding():
    reference, value = pair(0, 4, 50_000, noise=1e-4)
    # To second order KL is half the variance of the differences under p.
    p = torch.softmax(reference.double(), -1)
    difference = (value - reference).double()
    variance = (p * difference.square()).sum(-1) - (p * difference).sum(-1).square()
    assert torch.allclose(kl_divergence(reference, value), variance / 2, rtol=1e-3, atol=0)


@some
@given(st.integers(0, 2**32), st.floats(-100, 100))
def test_kl_is_non_negative_and_blind_to_a_shift(seed, shift):
    reference, value = pair(seed, 5, 30)
    assert bool((kl_divergence(reference, value) > 0).all())
    same = kl_divergence(reference.double(), reference.double() + shift)
    assert bool((same >= 0).all()) and float(same.max()) < 1e-12


def test_rows_and_pieces_do_not_change_results(monkeypatch):
    reference, value = pair(1, 9, 20)
    targets = torch.arange(9)
    whole = kl_divergence(reference, value), nll(value, targets), sqnr_db(reference, value), cosine(reference, value)
    for piece in (7, 45):
        monkeypatch.setattr(metrics, "_PIECE", piece)
        assert torch.equal(kl_divergence(reference, value), whole[0])
        assert torch.equal(nll(value, targets), whole[1])
        assert sqnr_db(reference, value) == pytest.approx(whole[2], rel=1e-13)
        assert cosine(reference, value) == pytest.approx(whole[3], rel=1e-13)


def test_top1_agreement():
    reference = torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert top1_agreement(reference, reference * torch.tensor([1.0, 1.0, -1.0])).tolist() == [True, True, False]


@some
@given(st.integers(0, 2**32), st.integers(1, 11), st.floats(0.1, 20))
def test_top_k_agreement_counts_common_tokens(seed, k, noise):
    reference, value = pair(seed, 4, 11, noise=noise)
    found = top_k_agreement(reference, value, k)
    assert found.dtype == torch.float64
    for i in range(4):
        first, second = (
            sorted(range(11), key=lambda t, row=row: -float(row[t]))[:k] for row in (reference[i], value[i])
        )
        assert float(found[i]) == pytest.approx(len(set(first) & set(second)) / k, rel=1e-15)


def test_top_k_agreement_does_not_ask_for_the_order_and_takes_small_vocabularies():
    reference = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert top_k_agreement(reference, reference[:, [4, 3, 2, 1, 0, 5]], 5).tolist() == [1]
    assert top_k_agreement(reference, -reference, 5).tolist() == [0.8]
    assert top_k_agreement(reference[:, :3], -reference[:, :3], 5).tolist() == [1]


@pytest.mark.parametrize("columns, length", [(5, 1), (64, 1), (65, 2), (511, 8), (1, 1)])
def test_stretches_are_equally_long_and_cover_everything(columns, length):
    values = torch.rand(3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    rows = values.tolist()
    expected = [
        math.fsum(row[c] for row in rows for c in range(start, min(start + length, columns)))
        / (3 * (min(start + length, columns) - start))
        for start in range(0, columns, length)
    ]
    assert by_stretch(values, 64).tolist() == pytest.approx(expected, rel=1e-14) and len(expected) <= 64


def test_the_margin_is_the_difference_of_the_two_largest_probabilities():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2]]).log()
    assert top_two_margin(logits).tolist() == pytest.approx([0.25, 0.4, 0.0], abs=1e-7)
    assert top_two_margin(torch.zeros(2, 1)).tolist() == [1, 1]


@some
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_separation_counts_pairs(given_pairs):
    values, marked = (torch.tensor(column) for column in zip(*given_pairs, strict=True))
    below = [
        1.0 if a < b else 0.5 if a == b else 0.0
        for a, is_marked in given_pairs if is_marked
        for b, other in given_pairs if not other
    ]  # fmt: skip
    found = separation(values, marked)
    assert found is None if not below else found == pytest.approx(sum(below) / len(below))


def test_margins_and_finiteness_are_found_in_pieces(monkeypatch):
    logits = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    logits[5, 3] = float("inf")
    whole = metrics.top_two_margin(logits[6:]), metrics.all_finite(logits)
    assert whole[1].tolist() == [row != 5 for row in range(37)]
    best = logits[6:].double().softmax(-1).topk(2, -1).values
    torch.testing.assert_close(whole[0], best[:, 0] - best[:, 1])
    monkeypatch.setattr(metrics, "_PIECE", 100)
    assert torch.equal(metrics.top_two_margin(logits[6:]), whole[0])
    assert torch.equal(metrics.all_finite(logits), whole[1])
