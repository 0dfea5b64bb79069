"""What cannot be captured is refused by the right kind of error, which says where and why."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError, InputError, NumericsError


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of a small Llama to spoil."""
    return shutil.copytree(model_folder("llama"), tmp_path / "model")


def change(folder, edit):
    """Rewrite the tensors of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_encoder_decoder_is_refused_with_what_works_instead(tmp_path):
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=r"t5 is an encoder-decoder.*take it whole.*get_encoder\(\)"):
        capture_model(tmp_path)


def test_a_decoder_with_bidirectional_attention_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CaptureError):
        capture_model(tmp_path)


def test_truncated_safetensors(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged") as caught:
        capture_model(folder)
    assert caught.value.place == str(file)


def test_safetensors_of_garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="truncated or damaged"):
        capture_model(folder)


def shard(folder, parts=2):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    weight_map = {}
    for i, name in enumerate(names):
        part = {n: t for k, (n, t) in enumerate(sorted(tensors.items())) if k % parts == i}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_shards_are_read_like_one_file(folder, model_folder):
    whole = capture_model(model_folder("llama"))
    shard(folder)
    parts = capture_model(folder)
    names = [n for b in parts.blocks for n in b.parameters]
    assert names and all(torch.equal(parts.load(n), whole.load(n)) for n in names)


def test_missing_shard(folder):
    gone = shard(folder)[1]
    (folder / gone).unlink()
    with pytest.raises(InputError, match=f"names {gone}, which is missing"):
        capture_model(folder)


def test_an_index_may_not_point_outside_its_folder(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(InputError, match="outside its folder"):
        capture_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="not a valid index"):
        capture_model(folder)


def test_pickles_are_not_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no safetensors file"):
        capture_model(folder)


def test_unknown_architecture(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(InputError, match="config that transformers understands"):
        capture_model(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json. The folder needs a config.json of a known model_type"):
        capture_model(folder)


def test_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="config.json: unreadable: Expecting value"):
        capture_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found_when_they_are_loaded(folder, value):
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors[name][5].fill_(value))
    model = capture_model(folder)
    with pytest.raises(NumericsError, match="64 of 6144 weights are NaN or Inf") as caught:
        model.load(name)
    assert caught.value.place == name
    with pytest.raises(NumericsError, match=name):
        export(folder, "w4a16_g32_rtn", out_dir=folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_weights_of_another_shape(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name][:-8].clone()}))
    with pytest.raises(CaptureError, match=r"\[88, 64\] in the checkpoint and \[96, 64\] by config.json") as caught:
        capture_model(folder)
    assert caught.value.place == name


def test_a_weight_that_is_not_there_is_not_made_up(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CaptureError, match=f"1 weights are not in the checkpoint, first {name}"):
        capture_model(folder)


def test_half_precision_checkpoints_load_as_float32(folder):
    change(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    model = capture_model(folder)
    name = model.blocks[1].parameters[0]
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        assert torch.equal(model.load(name), handle.get_tensor(name).float())


def test_base_model_checkpoints_have_no_prefix(folder, model_folder):
    """A checkpoint of the model without its head names weights without `model.`; a tied head is found there too."""
    tied = model_folder("llama_bias")
    shutil.copytree(tied, folder, dirs_exist_ok=True)
    change(folder, lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)])
    model, whole = capture_model(folder), capture_model(tied)
    assert all(torch.equal(model.load(n), whole.load(n)) for b in model.blocks for n in b.parameters)
