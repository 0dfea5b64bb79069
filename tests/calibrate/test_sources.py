"""Calibration samples from every source, with a tokenizer whose tokens are the bytes of the text."""

import builtins
import json
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tokenizer_files import BYTE_BOS as BOS
from helpers.tokenizer_files import byte_tokenizer
from qexport.calibrate.self_text import continue_text, write_text
from qexport.calibrate.sources import load_samples
from qexport.calibrate.sources.samples import spread
from qexport.calibrate.sources.text import _pieces
from qexport.errors import InputError, NumericsError
from qexport.recipe.recipe import CalibrationSpec

VOCAB = 300
ENGLISH = "".join(f"Line {i} speaks of {i * i} things.\n" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return byte_tokenizer(bos=True)


@pytest.fixture
def english(tmp_path):
    (tmp_path / "english.txt").write_text(ENGLISH)
    return str(tmp_path / "english.txt")


def spec(source="self", samples=4, sequence_length=16, **more):
    return CalibrationSpec(source=str(source), samples=samples, sequence_length=sequence_length, **more)


# --- text files


def test_windows_are_whole_pieces_of_the_text_spread_over_it(tokenizer, english):
    samples = load_samples(spec(english, samples=8, sequence_length=32), tokenizer=tokenizer, vocab_size=VOCAB)
    assert samples.input_ids.shape == (8, 32) and samples.input_ids.dtype == torch.int64
    assert samples.attention_mask.dtype == torch.int64 and samples.attention_mask.eq(1).all()
    windows = len(ENGLISH) // 32
    text = [ENGLISH[i * 32 : i * 32 + 32] for i in range(windows)]
    places = [text.index(tokenizer.decode(row)) for row in samples.input_ids]
    for i, place in enumerate(places):
        assert i * windows // 8 <= place < (i + 1) * windows // 8
    assert samples.described == "8 windows of 32 tokens from english.txt (seed 0)"


def test_the_seed_decides(tokenizer, english):
    first, again, other = (
        load_samples(spec(english, seed=seed), tokenizer=tokenizer, vocab_size=VOCAB).input_ids for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_window_begins_as_the_tokenizer_begins_a_text(with_bos, english):
    ids = load_samples(spec(english), tokenizer=with_bos, vocab_size=VOCAB).input_ids
    assert ids.shape == (4, 16) and ids[:, 0].eq(BOS).all() and ids[:, 1:].ne(BOS).all()
    assert with_bos.decode(ids[2, 1:]) in ENGLISH


def test_a_short_text_gives_fewer_windows_and_says_so(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 5)
    samples = load_samples(spec(tmp_path / "a.txt"), tokenizer=tokenizer, vocab_size=VOCAB)
    assert samples.input_ids.shape == (3, 16)
    assert samples.described == "3 windows of 16 tokens from a.txt (seed 0, 4 asked for)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: it holds no text"),
        (b" \n\t ", "a.txt: it holds no text"),
        (b"fifteen letters", r"a.txt: its 15 tokens are fewer than one sample of 16\. Give more text or a smaller"),
        ("grün".encode("latin-1"), r"a\.txt: byte 2 is not UTF-8"),
    ],
)
def test_unusable_text(content, message, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_samples(spec(tmp_path / "a.txt"), tokenizer=tokenizer, vocab_size=VOCAB)


def test_missing_files_and_tokenizers(tokenizer, tmp_path, english):
    with pytest.raises(InputError, match=r"gone\.txt: cannot read .*: No such file or directory\. Sources are"):
        load_samples(spec(tmp_path / "gone.txt"), tokenizer=tokenizer, vocab_size=VOCAB)
    with pytest.raises(InputError, match="is not a file"):
        load_samples(spec(tmp_path), tokenizer=tokenizer, vocab_size=VOCAB)
    with pytest.raises(InputError, match="text needs a tokenizer"):
        load_samples(spec(english), vocab_size=VOCAB)


def test_the_tokenizer_of_another_model_is_noticed(tokenizer, english):
    with pytest.raises(InputError, match=r"token id \d+ is outside the model's vocabulary of 60.*belongs to the model"):
        load_samples(spec(english), tokenizer=tokenizer, vocab_size=60)


def test_a_window_with_no_room_for_text(with_bos, english):
    with pytest.raises(InputError, match="1 tokens leave no room after the 1 that begin every text"):
        load_samples(spec(english, sequence_length=1), tokenizer=with_bos, vocab_size=VOCAB)


@pytest.mark.by_default("text1")
@pytest.mark.parametrize("text", ["word " * 200_000, "x" * 1_000_000, "\n".join(["a line of text"] * 70_000)])
def test_a_megabyte_takes_seconds(text, tokenizer, tmp_path):
    (tmp_path / "big.txt").write_text(text)
    begin = time.perf_counter()
    load_samples(spec(tmp_path / "big.txt", samples=32), tokenizer=tokenizer, vocab_size=VOCAB)
    # A linear pass takes under a second; one string of a megabyte through a quadratic tokenizer takes minutes.
    assert time.perf_counter() - begin < 10


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n", min_size=0, max_size=300), st.integers(0, 3))
def test_pieces_join_to_the_text(text, times):
    text = (text + "y" * 17_000) * times
    pieces = _pieces(text)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 16384 for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 200), st.integers(0, 2**63 - 1))
def test_spread_takes_one_of_each_stretch(count, n, seed):
    n = min(n, count)
    taken = spread(count, n, seed).tolist()
    assert all(i * count // n <= place < (i + 1) * count // n for i, place in enumerate(taken))


# --- strings and token ids


def test_strings_are_cut_and_padded_on_the_left(with_bos):
    samples = load_samples(spec(), ["abc", "x" * 40, "hello"], tokenizer=with_bos, vocab_size=VOCAB)
    assert samples.input_ids.shape == (3, 16)
    assert samples.attention_mask.sum(1).tolist() == [4, 16, 6]
    for row, mask, text in zip(samples.input_ids, samples.attention_mask, ["abc", "x" * 15, "hello"], strict=True):
        assert mask.diff().ge(0).all(), "padding is on the left"
        assert row[mask == 0].eq(0).all()
        assert with_bos.decode(row[mask == 1]) == "<s>" + text


def test_strings_are_padded_only_to_the_longest(tokenizer):
    samples = load_samples(spec(sequence_length=512), ["abc", "hello"], tokenizer=tokenizer, vocab_size=VOCAB)
    assert samples.input_ids.shape == (2, 5)
    assert samples.described == "2 texts of up to 5 tokens, given"


@pytest.mark.parametrize("kind", [torch.tensor, np.array, partial(np.array, dtype=np.uint16)])
def test_token_ids_are_taken_as_they_are(kind):
    ids = [[1, 2, 3], [299, 0, 4]]
    samples = load_samples(spec(), kind(ids), vocab_size=VOCAB)
    assert samples.input_ids.dtype == torch.int64 and samples.input_ids.tolist() == ids
    assert samples.attention_mask.eq(1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenized_batch_ends_up_padded_on_the_left(side, tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, "<s>"
    batch = tokenizer(["abc", "hello"], padding=True, return_tensors="pt")
    samples = load_samples(spec(), batch, vocab_size=VOCAB)
    expected = load_samples(spec(), ["abc", "hello"], tokenizer=tokenizer, vocab_size=VOCAB)
    assert torch.equal(samples.input_ids, expected.input_ids)
    assert torch.equal(samples.attention_mask, expected.attention_mask)


def test_padding_ids_may_lie_outside_the_vocabulary():
    batch = {"input_ids": [[5, -100], [6, 7]], "attention_mask": [[1, 0], [1, 1]]}
    samples = load_samples(spec(), batch, vocab_size=VOCAB)
    assert samples.input_ids.tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration texts: there are no samples"),
        (["abc", ""], "calibration text 1: it holds no text"),
        ("a single string", "str is not calibration data"),
        ([[1, 2]], "list is not calibration data"),
        (7, "int is not calibration data"),
        (torch.zeros(0, 4, dtype=torch.int64), "there are no samples"),
        (torch.zeros(4, dtype=torch.int64), r"token ids of int64 \[4\]\. Give integers \[n, S\]"),
        (torch.zeros(1, 4), r"token ids of float32 \[1, 4\]"),
        (torch.zeros(1, 4, dtype=torch.bool), r"token ids of bool \[1, 4\]"),
        (torch.tensor([[1, VOCAB]]), r"token id 300 is outside the model's vocabulary of 300"),
        (torch.tensor([[-1, 4]]), "token id -1 is outside"),
        ({"labels": [[1]]}, "it has no input_ids"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids are not a table of integers"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask \[1, 1\] does not fit input_ids \[1, 2\]"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "attention_mask .* does not fit"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 2]]}, "attention_mask .* does not fit"),
    ],
)
def test_unusable_data(data, message, tokenizer):
    with pytest.raises(InputError, match=message):
        load_samples(spec(), data, tokenizer=tokenizer, vocab_size=VOCAB)


# --- data sets on disk, read offline


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The optional package, with a cache of its own."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def row_text(i):
    return f"a{i:03} b{i:03} c{i:03} d{i:03}"  # 19 characters, no 16 of which come twice


@pytest.fixture
def rows(tmp_path, datasets):
    path = tmp_path / "rows.jsonl"
    lines = [{"text": row_text(i), "n": i, "note": None} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_data_set_column(tokenizer, rows):
    source = f"datasets:{rows}:train:text"
    samples = load_samples(spec(source), tokenizer=tokenizer, vocab_size=VOCAB)
    whole = "\n\n".join(map(row_text, range(200)))
    assert samples.input_ids.shape == (4, 16)
    places = [whole.index(tokenizer.decode(row)) for row in samples.input_ids]
    # 16 characters a token are read: 4 samples of 16 tokens come out of the first 1024 characters
    # and the row they end in; the last one out of their last quarter.
    assert places == sorted(places) and 3 * 256 - 16 <= places[-1] < 1024 + 21
    assert samples.described == f"4 windows of 16 tokens from {source} (seed 0)"


def test_a_slice_of_a_data_set(tokenizer, rows):
    source = f"datasets:{rows}:train[198:]:text"
    ids = load_samples(spec(source, samples=9), tokenizer=tokenizer, vocab_size=VOCAB).input_ids
    whole = f"{row_text(198)}\n\n{row_text(199)}"
    assert [tokenizer.decode(row) for row in ids] == [whole[:16], whole[16:32]]


def test_a_text_file_through_datasets(tokenizer, english, datasets):
    ids = load_samples(spec(f"datasets:{english}:train:text"), tokenizer=tokenizer, vocab_size=VOCAB).input_ids
    assert tokenizer.decode(ids[0]).split("\n")[0] in ENGLISH


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("datasets:{}:train:words", r"there is no column 'words'\. Columns are text, n, note"),
        ("datasets:{}:train:n", "column 'n' holds int, not text"),
        ("datasets:{}:train:note", "it holds no text"),
        ("datasets:{}:test:text", "the data set cannot be read: .*test"),
        ("datasets:{}x.json:train:text", "there is no such file"),
        ("datasets:{}", r"does not name a data set's column\. Write datasets:ID:SPLIT:COLUMN or"),
        ("datasets:{}::text", "does not name a data set's column"),
    ],
)
def test_unusable_data_sets(form, message, tokenizer, rows):
    with pytest.raises(InputError, match=message):
        load_samples(spec(form.format(rows)), tokenizer=tokenizer, vocab_size=VOCAB)


def test_a_data_set_on_the_hub_is_streamed_with_its_config(tokenizer, monkeypatch, datasets):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **asks: asked.append(asks) or [{"text": ENGLISH}])
    load_samples(spec("datasets:some/wiki:small-raw:train:text"), tokenizer=tokenizer, vocab_size=VOCAB)
    load_samples(spec("datasets:some/wiki:train[:100]:text"), tokenizer=tokenizer, vocab_size=VOCAB)
    assert asked == [
        {"path": "some/wiki", "name": "small-raw", "split": "train", "streaming": True},
        {"path": "some/wiki", "name": None, "split": "train[:100]", "streaming": False},
    ]


def test_without_the_datasets_package(tokenizer, rows, monkeypatch):
    really = builtins.__import__

    def without(name, *arguments, **more):
        if name == "datasets":
            raise ImportError(name)
        return really(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"not installed\. pip install 'qexport\[datasets\]'"):
        load_samples(spec(f"datasets:{rows}:train:text"), tokenizer=tokenizer, vocab_size=VOCAB)


# --- chance


def test_random_tokens_come_from_the_trained_vocabulary(with_bos):
    """The embedding has 300 rows, the tokenizer 257 tokens, one of them special."""
    samples = load_samples(spec("random", 64, 128), tokenizer=with_bos, vocab_size=VOCAB)
    assert samples.input_ids[:, 0].eq(BOS).all()
    drawn = samples.input_ids[:, 1:]
    assert drawn.unique().tolist() == list(range(256))
    # 8128 uniform draws of 256 tokens: each about 32 times; 80 has a probability below 1e-10.
    assert drawn.flatten().bincount().max() < 80
    assert samples.described == "64 sequences of 128 random tokens (seed 0)"


def test_random_tokens_without_a_tokenizer():
    first, again, other = (load_samples(spec("random", seed=seed), vocab_size=50).input_ids for seed in (1, 1, 2))
    assert first.shape == (4, 16) and first.max() < 50
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- the model's own text


def sample_text(step, bos_ids, n, length, seed, *, vocab_size, batch_size=4, **sampling):
    generate = partial(continue_text, step, **sampling)
    return write_text(generate, bos_ids, n, length, vocab=torch.arange(vocab_size), seed=seed, batch_size=batch_size)


class Chain:
    """A language model whose next token depends on the last alone: rows of logits. Remembers what it was fed."""

    def __init__(self, logits):
        self.logits, self.fed = logits, []

    def __call__(self, input_ids, past):
        self.fed.append((tuple(input_ids.shape), past))
        return self.logits[input_ids[:, -1]], (past or 0) + input_ids.shape[1]


def test_the_model_writes_after_bos_and_a_token_of_its_own_for_each_text(with_bos):
    chain = Chain(torch.zeros(VOCAB, VOCAB))
    samples = load_samples(
        spec("self", 18, 12, batch_size=4), tokenizer=with_bos, vocab_size=VOCAB, generate=partial(continue_text, chain)
    )
    assert samples.input_ids.shape == (18, 12) and samples.attention_mask.eq(1).all()
    assert samples.input_ids[:, 0].eq(BOS).all()
    first = samples.input_ids[:, 1]
    assert len(first.unique()) == 18 and first.max() < 256
    # Sixteen texts side by side, then the rest; in each batch the prompt once, then single tokens with the past.
    assert chain.fed[:10] == [((16, 2), None)] + [((16, 1), past) for past in range(2, 11)]
    assert [shape for shape, _ in chain.fed[10:]] == [(2, 2)] + [(2, 1)] * 9
    assert samples.described == "18 texts of 12 tokens written by the model (seed 0)"


def test_self_text_needs_somebody_to_write_it(tokenizer):
    with pytest.raises(InputError, match=r"cannot write its own calibration text here\. Give calibration data"):
        load_samples(spec("self"), tokenizer=tokenizer, vocab_size=VOCAB)


@pytest.mark.parametrize("wrong", [lambda ids, new, _: ids, lambda ids, new, _: torch.zeros(len(ids), 16)])
def test_a_generate_that_returns_something_else(wrong, tokenizer):
    with pytest.raises(InputError, match=r"for a prompt of \[4, 1\]\. .*the prompt and what follows it, \[4, 16\]"):
        load_samples(spec("self"), tokenizer=tokenizer, vocab_size=VOCAB, generate=wrong)


def test_a_model_of_nan_is_a_numerics_error():
    logits = torch.zeros(8, 8)
    logits[:, 3] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        sample_text(Chain(logits), [], 1, 4, 0, vocab_size=8)


def test_the_first_new_tokens_are_the_most_likely_ones():
    successor = torch.eye(50).roll(1, dims=1) * 1e-3  # hardly above the others
    ids = sample_text(Chain(successor), [0], 20, 30, seed=1, vocab_size=50)
    steps = ids.diff(dim=1) % 50
    assert steps[:, 1:5].eq(1).all()
    assert steps[:, 5:].eq(1).float().mean() < 0.1


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(4, 4)
    for temperature, top_k in [(1.0, None), (0.5, None), (1.0, 2), (1.0, 99)]:
        ids = continue_text(
            Chain(logits),
            torch.zeros(100, 1, dtype=torch.int64),
            100,
            torch.Generator().manual_seed(0),
            temperature=temperature,
            top_k=top_k,
            greedy=0,
        )
        shares = ids[:, 1:].flatten().bincount(minlength=4) / 10_000
        expected = (logits[0] / temperature).softmax(-1)
        if top_k == 2:
            expected = torch.cat([torch.zeros(2), (logits[0, 2:] / temperature).softmax(-1)])
        # Standard error of a share of 10 000 draws is at most 0.005; four of them.
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_the_same_seed_writes_the_same_text():
    first, again, other = (sample_text(Chain(torch.zeros(9, 9)), [1], 3, 20, seed, vocab_size=9) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("n", "length", "more", "message"),
    [
        (0, 8, {}, "0 samples are too few"),
        (1, 2, {}, "2 tokens leave no room after the 2 that begin every text"),
        (1, 8, {"temperature": 0.0}, r"temperature 0\.0"),
        (1, 8, {"top_k": 0}, "top_k 0"),
    ],
)
def test_impossible_self_text(n, length, more, message):
    with pytest.raises(InputError, match=message):
        sample_text(Chain(torch.zeros(9, 9)), [1, 2], n, length, 0, vocab_size=9, **more)


def test_more_texts_than_tokens_to_start_with():
    ids = write_text(
        lambda prompt, new, _: torch.cat([prompt, prompt.repeat(1, new)], 1),
        [],
        5,
        3,
        vocab=torch.tensor([7, 8]),
        seed=0,
    )
    assert sorted(ids[:, 0].bincount(minlength=9)[7:].tolist()) == [2, 3]
