"""GGUF files are read whole or refused, and nothing that was refused is kept."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.gguf_files import write_gguf
from qexport.errors import InputError
from qexport.models.source import open_model


@pytest.fixture
def made(model_folder, tmp_path):
    """made(**how) -> (file, what it opens as): see `write_gguf`."""

    def make(**how):
        file = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf", **how)
        return file, lambda: open_model(file, cache=tmp_path / "cache")

    return make


def nothing_kept(file):
    return not any((file.parent / "cache").glob("*"))


def test_every_weight_is_the_original(made, model_folder):
    file, opened = made()
    folder = opened()
    ours, want = load_file(folder.path / "model.safetensors"), load_file(model_folder("llama") / "model.safetensors")
    assert ours.keys() == want.keys() and all(torch.equal(ours[n], want[n]) for n in want)
    assert folder.name == str(file) and opened().path == folder.path  # made once


def test_missing_tensors_are_not_made_up(made):
    gone = ["blk.0.ffn_up.weight", "blk.1.attn_q.weight"]
    file, opened = made(change=lambda tensors: [tensors.pop(n) for n in gone])
    with pytest.raises(InputError, match=r"lacks 2 of the model's tensors, first model.layers.0.mlp.up_proj.weight, "):
        opened()
    assert nothing_kept(file)


def test_a_tensor_that_transformers_does_not_read_is_named(made):
    file, opened = made(change=lambda t: t.update({"blk.0.attn_sinks.weight": np.ones(5, np.float32)}))
    with pytest.raises(InputError, match=r"holds \d+ weights, but .* it seems to read no blk.0.attn_sinks.weight"):
        opened()
    assert nothing_kept(file)


def test_one_file_of_a_split_set_is_refused(made):
    file, opened = made(split__count=3, split__no=0)
    with pytest.raises(InputError, match="one of the 3 files of a split model.*llama-gguf-split --merge"):
        opened()
    with pytest.raises(InputError, match="not a complete GGUF file"):
        file.write_bytes(file.read_bytes()[:2000])
        opened()
    assert nothing_kept(file)


def test_a_file_with_other_bytes_is_converted_again(made, model_folder):
    _, opened = made()
    before = load_file(opened().path / "model.safetensors")
    _, opened = made(change=lambda tensors: tensors["output.weight"].__imul__(2))
    after = load_file(opened().path / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], 2 * before["lm_head.weight"])


def llama3(head_dim, theta):
    """Factors of Llama 3's frequencies as llama.cpp's converter writes them (factor 8, 1 and 4, 8192)."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / waves - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    return np.where(waves < 8192 / 4, 1, np.where(waves > 8192, 8, between)).astype(np.float32)


def test_rotary_frequencies_of_the_file_are_kept(made):
    factors = llama3(16, 10000.0)
    assert 1 in factors and 8 in factors
    _, opened = made(change=lambda tensors: tensors.update({"rope_freqs.weight": factors}))
    rope = opened().config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)
    _, opened = made(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    rope = opened().config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize("how", [
    {"change": lambda tensors: tensors.update({"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})},
    {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0},
], ids=["factors", "yarn"])  # fmt: skip
def test_rotary_frequencies_that_would_be_lost_are_refused(made, how):
    file, opened = made(**how)
    with pytest.raises(InputError, match="rotary frequencies"):
        opened()
    assert nothing_kept(file)
