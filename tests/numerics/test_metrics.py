"""Comparison metrics against sums written out, and their edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.numerics import metrics
from qexport.numerics.metrics import cosine, kl_divergence, nll, sqnr_db, top1_agreement

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
