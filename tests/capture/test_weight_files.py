"""The weights of a folder are the files that transformers reads, whatever else lies there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.random_decoders import VOCAB, reference_model, save_model
from helpers.runners import captured_runner, load_weights, prompt_feeds, tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError, InputError
from qexport.models.checkpoint import Checkpoint
from qexport.models.files import INDEX, WHOLE, weight_files
from qexport.models.source import open_model


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of a small Llama to spoil."""
    return shutil.copytree(model_folder("llama"), tmp_path / "model")


def index(folder, *files):
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): file for i, file in enumerate(files)}}))


def test_the_whole_file_is_read_before_copies_and_before_an_index(folder):
    assert weight_files(folder).read == (WHOLE,) and not weight_files(folder).notes
    shutil.copy(folder / WHOLE, folder / "model_old.safetensors")
    shutil.copy(folder / WHOLE, folder / "consolidated.safetensors")
    index(folder, "gone.safetensors", "model_old.safetensors")
    found = weight_files(folder)
    assert found.read == (WHOLE,)
    beside = f"consolidated.safetensors, {INDEX}, model_old.safetensors"
    assert found.notes == (f"the weights are {WHOLE}, as for transformers, and not {beside}",)


def test_a_copy_beside_the_weights_changes_nothing(folder):
    tensors = load_file(folder / WHOLE)
    save_file({n: torch.randn_like(t) for n, t in tensors.items()}, folder / "model_old.safetensors")
    checkpoint = Checkpoint(folder)
    assert all(torch.equal(checkpoint.load(n), t) for n, t in tensors.items())


def test_what_the_config_states_is_read_first(folder):
    (folder / WHOLE).rename(folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    assert capture_model(folder).weights.names()
    assert weight_files(folder, "mine.safetensors").read == ("mine.safetensors",)
    with pytest.raises(InputError, match="names other.safetensors as its weights, which is missing"):
        weight_files(folder, "other.safetensors")
    with pytest.raises(InputError, match="outside its folder"):
        weight_files(folder, "../model/mine.safetensors")


@pytest.mark.parametrize(("names", "why"), [
    (["model.fp16.safetensors"], "holds model.fp16.safetensors, but neither model.safetensors nor .*call the file"),
    (["model-00001-of-00002.safetensors"], "holds parts of a model .* but not model.safetensors.index.json"),
    (["pytorch_model.bin"], "holds no safetensors file but pickles .pytorch_model.bin., which can run code"),
    ([], "holds no safetensors file. Pass"),
], ids=["variant", "part", "pickle", "nothing"])  # fmt: skip
def test_other_names_are_no_weights(tmp_path, names, why):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=why):
        weight_files(tmp_path)


def adapter(folder, **said):
    folder.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **said}))


def test_an_adapter_is_refused_with_its_base(tmp_path, folder):
    adapter(tmp_path / "alone", base_model_name_or_path="some/base")
    with pytest.raises(InputError, match=r"an adapter \(LORA\) of some/base, not a whole model. Name its base"):
        open_model(tmp_path / "alone")
    adapter(folder, base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"has an adapter \(LORA\) beside its weights .* or move adapter_config.json"):
        open_model(folder)


def edit(folder, change):
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


def tie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_two_tensors_that_the_config_ties_are_kept_when_they_differ(folder):
    tie(folder)
    captured = load_weights(capture_model(folder))
    assert captured.notes == [
        "model.embed_tokens.weight and lm_head.weight differ in the checkpoint although config.json ties them "
        "(tie_word_embeddings): both are kept, as transformers does"
    ]
    feeds = prompt_feeds(captured, tokens(1, 5, vocab=VOCAB), torch.ones(1, 5, dtype=torch.int64))
    got = captured_runner(captured)(feeds)["logits"]
    want = transformers_runner(reference_model(folder))(feeds)["logits"]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_equal_tensors_that_the_config_ties_are_one(folder):
    tie(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    captured = capture_model(folder)
    assert not captured.notes and ("lm_head.weight",) in captured.tied.values() and not captured.left_out


def test_old_buffers_and_modules_for_speculation_are_left_out_and_named(folder):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.ones(1, 4),
        "mtp.layers.0.proj.weight": torch.ones(4, 4),
        "mtp.layers.0.proj.weight_scale_inv": torch.ones(1, 1),
    }  # fmt: skip
    edit(folder, lambda tensors: tensors.update(extra))
    assert capture_model(folder).left_out == sorted(extra)


def test_a_bias_that_the_config_does_not_know(folder):
    bias = "model.layers.1.mlp.up_proj.bias"
    edit(folder, lambda tensors: tensors.update({bias: torch.zeros(96)}))
    assert capture_model(folder).left_out == [bias]
    edit(folder, lambda tensors: tensors.update({bias: torch.ones(96)}))
    with pytest.raises(CaptureError, match="config.json has no such bias") as caught:
        capture_model(folder)
    assert caught.value.place == bias


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "\ud800.safetensors", "a\0b.safetensors"])
def test_a_name_that_no_file_can_have_is_missing(tmp_path, name):
    index(tmp_path, name)
    with pytest.raises(InputError, match="which is missing"):
        weight_files(tmp_path)


@pytest.mark.slow
def test_a_weight_that_transformers_reads_under_another_name_is_no_leftover(tmp_path):
    folder = save_model("granitemoe", tmp_path / "model")
    names = Checkpoint(folder).names()
    assert any("router.layer" in name for name in names)
    captured = capture_model(folder)
    assert any("router.weight" in name for block in captured.blocks for name in block.parameters)
