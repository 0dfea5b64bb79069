import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.onnx_decoder import EOS, write_tiny_decoder
from helpers.tokenizer_files import write_word_tokenizer
from qexport.errors import InputError
from qexport.runtime import generate
from qexport.runtime.decoder import Decoder, open_decoder
from qexport.runtime.generate import eos_token_ids, generate_text
from qexport.runtime.sampling import Sampling
from qexport.runtime.session import open_session
from qexport.validation.logits import deployed_logits

# Scores of differently shaped runs differ by the order of float32 sums.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    write_tiny_decoder(folder, up_scheme="float")
    write_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(folder):
    return open_decoder(folder, threads=1)


def greedy_without_cache(decoder, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        decoder.reset()
        tokens.append(int(decoder.run(np.array([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_cache_changes_nothing(decoder, parts):
    ids = np.random.default_rng(sum(parts)).integers(3, 97, (2, sum(parts)))
    decoder.reset()
    whole = decoder.run(ids).copy()
    decoder.reset()
    pieces = [decoder.run(part).copy() for part in np.split(ids, np.cumsum(parts)[:-1], axis=1)]
    assert decoder.past == sum(parts)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, **CLOSE)


def test_greedy_tokens_are_those_of_runs_without_a_cache(decoder):
    result = decoder.generate([[5, 6, 7]], max_new_tokens=10)
    assert result.tokens[0] == greedy_without_cache(decoder, [5, 6, 7], 10)
    assert result.finished == (False,)


def test_row_of_a_padded_batch_gets_what_it_gets_alone(decoder):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    together = decoder.generate(prompts, max_new_tokens=12).tokens
    alone = tuple(decoder.generate([prompt], max_new_tokens=12).tokens[0] for prompt in prompts)
    assert together == alone


def test_padded_logits_are_those_without_padding(decoder):
    decoder.reset()
    alone = decoder.run(np.array([[5, 6, 7]])).copy()
    decoder.reset()
    ids, mask = np.array([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]]), np.array([[0, 0, 1, 1, 1], [1] * 5])
    padded = decoder.run(ids, mask).copy()
    np.testing.assert_allclose(padded[0, 2:], alone[0], **CLOSE)
    decoder.reset()  # in pieces, the padding within the first
    pieces = [decoder.run(ids[:, :3], mask[:, :3]).copy(), decoder.run(ids[:, 3:]).copy()]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[mask > 0], padded[mask > 0], **CLOSE)


def test_row_ends_at_its_end_of_sequence_token_and_the_others_go_on(decoder):
    free = decoder.generate([[5, 6, 7], [20, 21]], max_new_tokens=8).tokens
    stop = free[0][2]
    assert stop not in free[1]
    seen = []
    result = decoder.generate(
        [[5, 6, 7], [20, 21]],
        max_new_tokens=8,
        eos_token_ids=[stop],
        on_token=lambda row, token: seen.append((row, token)),
    )
    assert result.tokens == (free[0][:3], free[1])
    assert result.finished == (True, False)
    assert tuple(token for row, token in seen if row == 0) == free[0][:3]
    assert [row for row, _ in seen[:4]] == [0, 1, 0, 1]


def test_generation_stops_when_every_row_is_finished(decoder):
    first = decoder.generate([[5, 6, 7]], max_new_tokens=1).tokens[0][0]
    assert decoder.generate([[5, 6, 7]], max_new_tokens=50, eos_token_ids=[first]).tokens == ((first,),)
    assert decoder.past == 3


def test_seed_decides_the_draws_and_a_row_does_not_depend_on_the_others(decoder):
    draw = Sampling(temperature=2.0, top_k=40, top_p=0.95, seed=3)
    prompts = [[5, 6, 7], [9, 8, 7]]
    first = decoder.generate(prompts, max_new_tokens=12, sampling=draw).tokens
    assert decoder.generate(prompts, max_new_tokens=12, sampling=draw).tokens == first
    assert decoder.generate(prompts[:1], max_new_tokens=12, sampling=draw).tokens == first[:1]
    other = Sampling(temperature=2.0, top_k=40, top_p=0.95, seed=4)
    assert decoder.generate(prompts, max_new_tokens=12, sampling=other).tokens != first


def test_shared_cache_computes_what_separate_past_and_present_do(decoder, tmp_path):
    write_tiny_decoder(tmp_path, up_scheme="float", shared_cache=True)
    shared = open_decoder(tmp_path, threads=1, max_length=16)
    prompts = [[5, 6, 7, 8], [9, 8, 7, 6]]
    expected = decoder.generate(prompts, max_new_tokens=12).tokens
    assert shared.generate(prompts, max_new_tokens=12).tokens == expected
    with pytest.raises(InputError, match="17 tokens do not fit into a cache of 16"):
        shared.run(np.ones((2, 2), np.int64))


def test_shared_cache_of_an_earlier_batch_leaves_nothing_behind(decoder, tmp_path):
    write_tiny_decoder(tmp_path, up_scheme="float", shared_cache=True)
    shared = open_decoder(tmp_path, threads=1, max_length=16)
    for prompts in ([[90, 80, 70, 60, 50, 40]], [[5, 6, 7], [9, 8, 7]], [[5, 6, 7]], [[9, 8, 7]]):
        assert shared.generate(prompts, max_new_tokens=5).tokens == decoder.generate(prompts, max_new_tokens=5).tokens


def test_logits_of_a_step_outlive_the_next(decoder, tmp_path):
    write_tiny_decoder(tmp_path, up_scheme="float", shared_cache=True)
    for each in (decoder, open_decoder(tmp_path, threads=1, max_length=16)):
        each.reset()
        first = each.run(np.array([[5, 6]]))
        kept = first.copy()
        each.run(np.array([[7, 8]]))
        np.testing.assert_array_equal(first, kept)


def test_padding_is_remembered_beyond_the_first_room_for_the_mask(tmp_path):
    write_tiny_decoder(tmp_path, up_scheme="float", max_length=320)
    decoder, random = open_decoder(tmp_path, threads=1), np.random.default_rng(0)
    parts = [random.integers(3, 97, (2, length)) for length in (4, 300, 2, 1)]
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    together = [decoder.run(parts[0], mask).copy(), *(decoder.run(part).copy() for part in parts[1:])]
    for row, start in enumerate((2, 0)):
        decoder.reset()
        alone = decoder.run(np.concatenate(parts, axis=1)[row : row + 1, start:])[0]
        np.testing.assert_allclose(np.concatenate(together, axis=1)[row, start:], alone, **CLOSE)


@pytest.mark.parametrize("shared", [False, True])
def test_file_with_the_last_logits_alone_generates_the_same(decoder, tmp_path, shared):
    manifest = write_tiny_decoder(tmp_path, up_scheme="float", shared_cache=shared, last_logits=True)
    last = open_decoder(tmp_path, threads=1, max_length=32)
    prompts = [[5, 6, 7, 8], [9, 8, 7, 6]]
    assert last.generate(prompts, max_new_tokens=12).tokens == decoder.generate(prompts, max_new_tokens=12).tokens
    ids = torch.tensor([5, 6, 7, 8, 9])
    decoder.reset()
    expected = decoder.run(ids[None].numpy())[0]
    np.testing.assert_allclose(deployed_logits(tmp_path, manifest, 5, threads=1)(ids), expected, **CLOSE)


def test_shared_cache_needs_a_length(tmp_path):
    manifest = write_tiny_decoder(tmp_path, layers=1, shared_cache=True)
    with pytest.raises(InputError, match="max_length"):
        Decoder(open_session(tmp_path), manifest.settings)


def test_file_without_position_ids_takes_prompts_of_one_length_only(tmp_path):
    write_tiny_decoder(tmp_path, positions=False)
    decoder = open_decoder(tmp_path, threads=1)
    assert len(decoder.generate([[5, 6], [7, 8]], max_new_tokens=4).tokens[1]) == 4
    with pytest.raises(InputError, match="one by one"):
        decoder.generate([[5, 6], [7]], max_new_tokens=4)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([[5, 6]], [[1, 0]], "left"),
        ([[5, 6]], [[0, 0]], "left"),
        ([[5, 6]], [[1]], "must both be"),
        ([[]], None, "must both be"),
    ],
)
def test_bad_input_is_an_input_error(decoder, ids, mask, words):
    decoder.reset()
    with pytest.raises(InputError, match=words):
        decoder.run(np.array(ids, np.int64), None if mask is None else np.array(mask))


def test_batch_cannot_change_in_the_middle(decoder):
    decoder.reset()
    decoder.run(np.array([[5, 6]]))
    with pytest.raises(InputError, match="reset"):
        decoder.run(np.array([[5], [6]]))


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []]])
def test_empty_prompts_are_input_errors(decoder, prompts):
    with pytest.raises(InputError, match="nothing to continue"):
        decoder.generate(prompts, max_new_tokens=1)


def test_text_streams_in_pieces_that_add_up(folder):
    pieces = {0: [], 1: []}
    texts = generate_text(
        folder, ["hello there", "x"], max_new_tokens=12, threads=1, on_text=lambda row, piece: pieces[row].append(piece)
    )
    assert ["".join(pieces[row]) for row in (0, 1)] == texts
    assert all(len(parts) > 3 for parts in pieces.values())
    assert generate_text(folder, "x", max_new_tokens=12, threads=1) == texts[1:]


def test_character_of_several_tokens_is_held_back_until_whole():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    stream = generate.TextStream(Bytes(), "folder")
    assert [stream.push(byte) for byte in "aé!".encode()] == ["a", "", "é", "!"]
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_chat_puts_the_prompt_into_the_template(folder, tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        generate_text(folder, "x", chat=True)
    write_tiny_decoder(tmp_path, up_scheme="float")
    write_word_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "Q:{{ messages[0]['content'] }}A:"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert generate_text(tmp_path, "x", chat=True, max_new_tokens=8) == generate_text(
        tmp_path, "Q:xA:", max_new_tokens=8
    )


def test_folder_without_a_tokenizer_is_an_input_error(tmp_path):
    write_tiny_decoder(tmp_path, layers=1)
    with pytest.raises(InputError, match="tokenizer"):
        generate_text(tmp_path, "x")


def test_end_tokens_come_from_the_generation_config_first(tmp_path):
    assert eos_token_ids(tmp_path, 7) == (7,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    assert eos_token_ids(tmp_path, 7) == (EOS,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert eos_token_ids(tmp_path, 7) == (4, 5)
