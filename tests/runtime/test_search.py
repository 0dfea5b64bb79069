"""Beams, the rules of generation configs and those of Whisper: what transformers' own model writes, token by token."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM, WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from helpers.onnx_decoder import write_tiny_decoder
from helpers.random_modules import VOCAB, save_seq2seq
from helpers.runners import padded, tokens
from helpers.tokenizer_files import write_word_tokenizer
from qexport import Sampling, Speech, bench, export, generate
from qexport.errors import InputError
from qexport.recipe.recipe import Recipe
from qexport.runtime.seq2seq import habits_of, open_seq2seq
from qexport.runtime.speech import speech_tokens

FLOAT = Recipe(scheme="w8a8_static", overrides=[{"match": "*", "scheme": "float"}], embedding="float")
# Of a vocabulary of 128: words, two languages, two tasks, "no speech", "no times", and 32 times.
HEARD = {
    "decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "is_multilingual": True,
    "lang_to_id": {"<|en|>": 90, "<|de|>": 91}, "task_to_id": {"transcribe": 92, "translate": 93},
    "no_timestamps_token_id": 95, "max_initial_timestamp_index": 10, "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [8, 2], "return_timestamps": False,
}  # fmt: skip
SPECTRA = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(2))


def exported(family, place, gain, **config):
    folder = save_seq2seq(family, place / "model", gain=gain)
    if config:
        (folder / "generation_config.json").write_text(json.dumps(config))
    write_word_tokenizer(folder, VOCAB)
    export(folder, FLOAT, out_dir=place / "out")
    return folder, place / "out"


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return exported("t5", tmp_path_factory.mktemp("t5"), 2.0)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return exported("whisper", tmp_path_factory.mktemp("whisper"), 1.0, **HEARD)


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "rules",
    [
        {"num_beams": 4},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 69},
        {"repetition_penalty": 1.5, "min_new_tokens": 5, "forced_eos_token_id": 1},
        {"num_beams": 2, "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[105]]},
    ],
)
def test_beams_and_rules_are_those_of_transformers(t5, rules, tmp_path):
    model, made = AutoModelForSeq2SeqLM.from_pretrained(t5[0]).eval(), shutil.copytree(t5[1], tmp_path / "out")
    mask = padded([9, 4], "right")
    ids = tokens(*mask.shape, vocab=VOCAB)
    # Without one, transformers 5.23 makes a cache for as many layers as the encoder has.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    want = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **rules)
    own = json.loads((made / "generation_config.json").read_text())
    (made / "generation_config.json").write_text(json.dumps(own | rules))
    pair, heard = open_seq2seq(made), []
    source = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    got = pair.write(source, max_new_tokens=12, on_token=lambda row, token: heard.append((row, token)))
    end = rules.get("eos_token_id", own["eos_token_id"])
    for row, (wanted, found) in enumerate(zip(want[:, 1:].tolist(), got.tokens, strict=True)):
        assert wanted[: len(found)] == list(found) and (len(found) == 12 or found[-1] == end)
        assert got.finished[row] == (end in found) and [token for r, token in heard if r == row] == list(found)
    assert len({*got.tokens}) == 2


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "asked, speech",
    [
        ({}, None),
        ({"language": "de", "task": "translate"}, Speech("de", "translate")),
        ({"return_timestamps": True, "language": "en", "num_beams": 3}, Speech("<|en|>", timestamps=True)),
        ({"return_timestamps": True}, Speech(timestamps=True)),
    ],
)
def test_speech_is_written_down_as_whisper_does(whisper, asked, speech):
    model = WhisperForConditionalGeneration.from_pretrained(whisper[0]).eval()
    want = model.generate(SPECTRA, max_new_tokens=12, force_unique_generate_call=True, **asked)
    pair = open_seq2seq(whisper[1])
    got = pair.write(
        {"input_features": SPECTRA.numpy()}, max_new_tokens=12, speech=speech, beams=asked.get("num_beams")
    )
    for wanted, found in zip(want.tolist(), got.tokens, strict=True):
        assert wanted[-12:][: len(found)] == list(found) and len(found) == 12
        if speech and speech.timestamps:
            assert found[0] > 95


def test_times_stand_in_the_text(whisper, run, tmp_path):
    folder = whisper[1]
    inputs = {"input_features": SPECTRA[:1].numpy()}
    timed = generate(folder, inputs=inputs, max_new_tokens=8, speech=Speech(timestamps=True))[0]
    assert timed.startswith("<|0.") and "|>" in timed
    words = speech_tokens({"no_timestamps_token_id": 95})
    assert words.timed([96, 4, 5, 98, 98, 6], lambda row: f" {row}") == "<|0.00|> [4, 5]<|0.04|><|0.04|> [6]"
    save_file({"input_features": SPECTRA[:1]}, tmp_path / "spectra.safetensors")
    command = ("generate", folder, "--inputs", tmp_path / "spectra.safetensors", "--max-new-tokens", 8)
    code, shown, _ = run(*command, "--timestamps")
    assert code == 0 and shown.strip() == timed
    code, shown, _ = run(*command, "--language", "de", "--beams", 2)
    assert code == 0 and shown.strip()
    for wrong, said in (
        (("--language", "tlh"), "there is no language called 'tlh'. Those it has are en, de"),
        (("--task", "sing"), "Those it has are transcribe, translate"),
        (("--beams", 2, "--temperature", 1), "cannot sample"),
        (("--beams", 0), "0 beams"),
    ):
        code, shown, err = run(*command, *wrong)
        assert code == 2 and said in " ".join(err.split()) and "Traceback" not in err


def test_what_begins_texts_of_speech():
    heard = {"no_timestamps_token_id": 95, "lang_to_id": {"<|en|>": 90, "<|de|>": 91}, "task_to_id": {"transcribe": 92}}
    logits = np.zeros((2, 128))
    logits[0, 91], logits[1, 90], logits[:, 3] = 1, 1, 2

    def begun(speech, **config):
        return speech_tokens(heard | config).beginnings(speech, 1, 2, lambda prompts: logits)

    assert begun(Speech()) == [[1, 91, 95], [1, 90, 95]]
    assert begun(Speech(), forced_decoder_ids=[[1, None], [2, 92], [3, 95]]) == [[1, 91, 92, 95], [1, 90, 92, 95]]
    assert begun(Speech(timestamps=True), forced_decoder_ids=[[1, 90], [2, 92], [3, 95]]) == [[1, 90, 92]] * 2
    assert begun(Speech("en"), forced_decoder_ids=[[1, 91], [2, 93]]) == [[1, 90, 92, 95]] * 2
    assert begun(Speech(), language="de") == [[1, 91, 92, 95]] * 2
    assert begun(Speech(), lang_to_id=None, task_to_id=None) == [[1, 95]] * 2
    assert speech_tokens({}) is None
    with pytest.raises(InputError, match="no other language or task"):
        begun(Speech("en"), lang_to_id=None)
    with pytest.raises(InputError, match="language 128 is outside of a vocabulary of 128"):
        begun(Speech(), lang_to_id={"en": 128})


@pytest.mark.parametrize(
    "wrong", [{"lang_to_id": [90]}, {"task_to_id": {"transcribe": "x"}}, {"no_timestamps_token_id": 1.5}]
)
def test_damaged_tokens_of_speech_are_named(wrong, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(HEARD | wrong))
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is not a token id"):
        habits_of(tmp_path)


def test_who_has_no_speech_or_draws_says_so(t5):
    pair = open_seq2seq(t5[1])
    source = {"input_ids": tokens(1, 4, vocab=VOCAB).numpy(), "attention_mask": np.ones((1, 4), np.int64)}
    with pytest.raises(InputError, match="no source to write about"):
        pair.write({name: array[:0] for name, array in source.items()}, max_new_tokens=2)
    with pytest.raises(InputError, match="has no languages or timestamps"):
        pair.write(source, max_new_tokens=2, speech=Speech("en"))
    with pytest.raises(InputError, match="cannot sample"):
        pair.write(source, max_new_tokens=2, beams=2, sampling=Sampling())


def test_a_beginning_that_fills_the_context_is_refused(whisper):
    source = {"input_features": SPECTRA[:1].numpy()}
    pair = open_seq2seq(whisper[1])
    assert len(pair.write(source, max_new_tokens=9, prompts=[[1] * 60]).tokens[0]) == 4
    with pytest.raises(InputError, match="64 tokens leave no room: the model reads at most 64"):
        pair.write(source, max_new_tokens=9, prompts=[[1] * 64])


def test_sources_and_what_follows_are_measured(t5, whisper, tmp_path):
    found = bench(t5[1], prompt_lengths=[6], decode_pasts=[6], repeats=1, threads=1)
    assert set(found.first.samples) == {"load", "prefill:6", "decode:6"} and "prompts are sources" in found.notes[0]
    parts = [t5[1] / part / f"model.onnx{end}" for part in ("encoder", "decoder") for end in ("", ".data")]
    assert found.first.model_bytes == sum(file.stat().st_size for file in parts)
    with pytest.raises(InputError, match="spectrograms of 32 frames, and no others"):
        bench(whisper[1], prompt_lengths=[6])
    with pytest.raises(InputError, match="sources of different kinds"):
        bench(whisper[1], t5[1])
    write_tiny_decoder(tmp_path / "decoder")
    with pytest.raises(InputError, match="measured beside others"):
        bench(t5[1], tmp_path / "decoder")


@pytest.mark.slow
def test_spectrograms_are_measured_at_their_length(whisper):
    found = bench(whisper[1], repeats=1, threads=1)
    assert set(found.first.samples) == {"load", "prefill:32", "decode:32"}
