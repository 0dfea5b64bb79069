"""onnxruntime-genai runs an exported Whisper, and writes the same tokens as our own loop."""

import wave

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from helpers.random_modules import VOCAB
from helpers.tokenizer_files import write_word_tokenizer
from qexport import export
from qexport.artifact.manifest import Manifest
from qexport.errors import InputError
from qexport.recipe.recipe import Recipe
from qexport.runtime.genai_speech import audio_config, genai_config
from qexport.runtime.seq2seq import open_seq2seq

CONFIG = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_target_positions": 64,
    "max_source_positions": 1500, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


def both(**fields):
    parts = ("encoder", "decoder")
    return {part: Manifest(target="cpu", kind="module", session={"a.b": part}, **fields) for part in parts}


def test_its_config_names_both_files_and_what_goes_between():
    found = genai_config(both(), CONFIG, CONFIG)
    encoder, decoder = found["model"]["encoder"], found["model"]["decoder"]
    assert encoder["filename"] == "encoder/model.onnx" and decoder["session_options"]["a.b"] == "decoder"
    assert encoder["outputs"]["cross_present_key_names"] == decoder["inputs"]["cross_past_key_names"]
    assert (encoder["num_hidden_layers"], decoder["num_hidden_layers"], decoder["head_size"]) == (1, 2, 16)
    assert found["search"]["max_length"] == 64 and found["model"]["eos_token_id"] == 2
    steps = audio_config({"feature_size": 128})["feature_extraction"]["sequence"]
    assert steps[2]["operation"]["attrs"]["n_mel"] == 128 and steps[1]["operation"]["attrs"]["n_fft"] == 400
    with pytest.raises(InputError, match="1500 positions, and this model of 16"):
        genai_config(both(), CONFIG | {"max_source_positions": 16}, CONFIG)
    with pytest.raises(InputError, match="no eos_token_id"):
        genai_config(both(), CONFIG, {})
    with pytest.raises(InputError, match="not configured for the target"):
        genai_config(both(genai_provider_options=None), CONFIG, CONFIG)


@pytest.mark.slow
def test_it_writes_the_same_about_sound(tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "model")
    write_word_tokenizer(tmp_path / "model", VOCAB)
    hears = WhisperFeatureExtractor()
    hears.save_pretrained(tmp_path / "model")
    out = export(tmp_path / "model", Recipe(scheme="w8a8_dyn"), out_dir=tmp_path / "out").folder
    time = np.arange(48000) / 16000
    sound = (0.3 * 32767 * np.sin(2 * np.pi * (200 + 100 * time) * time)).astype(np.int16)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000), file.writeframes(sound.tobytes())
    loaded, pair = og.Model(str(out)), open_seq2seq(out)

    def written(give, begin=()):
        parameters = og.GeneratorParams(loaded)
        parameters.set_search_options(max_length=24, do_sample=False)
        generator = og.Generator(loaded, parameters)
        give(generator)
        if begin:
            generator.append_tokens(list(begin))
        while not generator.is_done():
            generator.generate_next_token()
        return tuple(map(int, generator.get_sequence(0)))

    spectrum = np.ascontiguousarray(
        hears(sound / 32768, sampling_rate=16000, return_tensors="np").input_features, np.float32
    )  # which genai reads where it lies
    ours = pair.write({"input_features": spectrum}, max_new_tokens=22, prompts=[[1, 5]]).tokens[0]
    theirs = written(lambda generator: generator.set_model_input("input_features", spectrum), [1, 5])
    assert theirs == (1, 5, *ours) and len(set(ours)) > 3
    inputs = loaded.create_multimodal_processor()(["w5"], audios=og.Audios.open(str(tmp_path / "sound.wav")))
    found = inputs["audio_features"].as_numpy().copy()
    begin = inputs["input_ids"].as_numpy()[0].tolist()
    off = np.abs(found - spectrum).max((0, 1))
    # At the beginning and at the end of sound extensions and transformers pad otherwise.
    assert off[2:298].max() < 1e-4 and off[302:].max() < 1e-4 and off.max() > 0.1
    own = pair.write({"input_features": found}, max_new_tokens=24 - len(begin), prompts=[begin]).tokens[0]
    assert written(lambda generator: generator.set_inputs(inputs)) == (*begin, *own)
