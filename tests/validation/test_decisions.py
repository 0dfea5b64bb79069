"""What two outputs decide, against numbers worked out by hand."""

import math

import pytest
import torch

from qexport.validation.decisions import decisions, rank_correlation


def test_classes():
    want = [torch.tensor([[0.0, math.log(3.0)], [2.0, 0.0]]), torch.tensor([[1.0, 1.0]])]
    got = [torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    found = decisions("logits", want, got, "class")
    kl = [0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)]
    for before, after in ((2.0, 3.0), (0.0, -1.0)):  # logits less the second one
        p, q = (1 / (1 + math.exp(-x)) for x in (before, after))
        kl.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert found["choices"] == 3 and found["same_choice"] == pytest.approx(1 / 3)
    assert found["choice_kl"] == pytest.approx(sum(kl) / 3)


def test_pixels_choose_by_the_second_axis():
    want = torch.zeros(1, 2, 2, 2)
    want[0, 1, 0, 0] = 1.0
    got = want.clone()
    got[0, 1, 1, 1] = 1.0
    found = decisions("logits", [want], [got], "class of a pixel")
    assert (found["choices"], found["same_choice"]) == (4, 0.75)


def test_yes_or_no_and_scores():
    want, got = torch.tensor([[1.0, -1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1.0, 2.0, -3.0]])
    assert decisions("logits", [want], [got], "yes or no") == {"choices": 4, "same_choice": 0.5}
    assert decisions("logits", [want.t()], [want.t() * 2], "class") == {"rank_correlation": pytest.approx(1.0)}
    assert decisions("logits", [want[:, :1]], [got[:, :1]], "class") == {"rank_correlation": None}


def test_embeddings():
    want = torch.eye(3)
    got = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found = decisions("sentence_embedding", [want[:2], want[2:]], [got[:2], got[2:]], "embedding")
    assert found["row_cosine"] == pytest.approx((2**-0.5 + 2) / 3)
    assert found["rank_correlation"] is None  # all pairs of the float ones are equally far
    assert decisions("last_hidden_state", [want], [got], "embedding") == {}


def test_what_decides_nothing_has_no_measure():
    assert decisions("logits", [torch.zeros(2, 3)], [torch.zeros(2, 3)], "") == {}
    assert decisions("pred_boxes", [torch.zeros(2, 3)], [torch.zeros(2, 3)], "class") == {}


def test_rank_correlation_of_equal_numbers():
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: covariance 4.5 over the root of 4.5 times 5.
    found = rank_correlation(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
