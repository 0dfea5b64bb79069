"""Texts come from the same random numbers whatever model writes them, and both kinds of model are run as they are."""

import numpy as np
import pytest
import torch

from helpers.onnx_decoder import EOS, write_tiny_decoder
from helpers.random_decoders import reference_model
from qexport.calibrate.float_model import running
from qexport.errors import NumericsError
from qexport.runtime.decoder import open_decoder
from qexport.runtime.sampling import Sampling
from qexport.sampling_study.grid import Draw
from qexport.sampling_study.writers import ExportWriter, FloatWriter, write

PROMPT = [5, 6, 7, 8]
GREEDY = Draw(0.0, 0, 0)


class Fixed:
    """A model whose logits are given: a row for each step, whatever it read."""

    name = "fixed"

    def __init__(self, logits):
        self._rows = iter(np.asarray(logits, np.float32))

    def start(self, prompt):
        return next(self._rows)

    def step(self, token):
        return next(self._rows)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_decoder(folder, up_scheme="float")
    return open_decoder(folder, threads=1, max_length=64)


def test_a_token_is_drawn_by_the_number_of_its_place():
    flat, peaked = np.zeros(10), np.full(10, -100.0)
    peaked[4] = 0
    draw = Draw(1.0, 0, 3)
    numbers = np.random.default_rng([3, 2]).random(6)  # by hand: each tenth of [0, 1) is a token
    expected = tuple(int(10 * u) for u in numbers)
    assert write(Fixed([flat] * 6), [1], draw, 2, 6, set()).tokens == expected
    # Another model, even one that leaves no choice, takes no number away from the tokens behind it.
    mixed = write(Fixed([peaked, flat, peaked, flat, flat, flat]), [1], draw, 2, 6, set()).tokens
    assert mixed == (4, expected[1], 4, *expected[3:])
    cooler = write(Fixed([flat] * 6), [1], Draw(0.5, 10, 3), 2, 6, set()).tokens
    assert cooler == expected
    others = [write(Fixed([flat] * 6), [1], d, s, 6, set()).tokens for d, s in ((draw, 1), (Draw(1.0, 0, 4), 2))]
    assert expected not in others


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 20, seed=5)])
def test_an_export_writes_what_generate_writes(tiny, sampling):
    draw = Draw(0.8, 20, 5) if sampling else GREEDY
    found = write(ExportWriter("tiny", tiny, None), PROMPT, draw, 0, 24, {EOS}, keep=True)
    expected = tiny.generate([PROMPT], max_new_tokens=24, eos_token_ids=[EOS], sampling=sampling).tokens[0]
    assert found.tokens == expected and len(found.seconds) == len(expected) - 1
    assert found.logits.shape == (len(expected), 97)


@pytest.mark.parametrize("piece", [None, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_forced_text_gets_the_logits_it_was_written_by(tiny, piece, count):
    writer = ExportWriter("tiny", tiny, piece)
    text = write(writer, PROMPT, Draw(1.0, 0, 0), 0, count, set(), keep=True)
    torch.testing.assert_close(writer.forced(PROMPT, text.tokens), text.logits, rtol=1e-4, atol=1e-5)


def test_an_end_token_ends_a_text_and_belongs_to_it():
    rows = np.full((5, 10), -9.0)
    rows[[0, 1, 2], [4, 2, 7]] = 9
    assert write(Fixed(rows), [1], GREEDY, 0, 5, {2}).tokens == (4, 2)
    assert write(Fixed(rows), [1], GREEDY, 0, 2, set()).tokens == (4, 2)


def test_nan_logits_are_named():
    rows = np.zeros((3, 10))
    rows[1, 3] = np.nan
    with pytest.raises(NumericsError, match="fixed, token 2.*NaN.*qexport validate"):
        write(Fixed(rows), [1], GREEDY, 0, 3, set())


def test_the_float_model_is_the_one_of_transformers(captured, model_folder):
    model = reference_model(model_folder("llama"))
    with running(captured("llama")) as run:
        writer = FloatWriter("float", run)
        found = write(writer, PROMPT, GREEDY, 0, 10, set(), keep=True)
        forced = writer.forced(PROMPT, found.tokens)
    with torch.no_grad():
        expected = model(torch.tensor([[*PROMPT, *found.tokens]])).logits[0, len(PROMPT) - 1 : -1]
    assert found.tokens == tuple(expected.argmax(-1).tolist())
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forced, expected, rtol=1e-4, atol=1e-4)
