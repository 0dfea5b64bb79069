"""Decoders with another head than a language model's keep it, and compute what transformers computes with it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from helpers import exports
from helpers.random_decoders import LISTS, VOCAB, save_random
from helpers.runners import captured_runner, load_weights, padded, tokens
from qexport import validate
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError
from qexport.models.heads import note_on_bare
from qexport.recipe.recipe import Recipe

PAD = 3
MASKS = [torch.ones(1, 1, dtype=torch.int64), padded([6, 2, 9], "right"), padded([6, 2, 9], "left")]


def save(folder, loader, family="qwen3", **changes):
    given = LISTS["families"][family] | {"pad_token_id": PAD, "num_hidden_layers": 1}
    return save_random(given, folder, loader, **changes)


def feeds_of(mask):
    """Random tokens, none of which is padding, and padding where the mask says so."""
    ids = tokens(*mask.shape, vocab=VOCAB)
    ids = torch.where(ids == PAD, PAD + 1, ids)
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def close(got, want):
    return (got - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.by_default("llama")
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_score_is_that_of_the_last_token_on_either_side_of_padding(tmp_path, family):
    folder = save(tmp_path / "model", AutoModelForSequenceClassification, family, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    recipe = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
    made = exports.export(capture_model(folder), recipe, "cpu", tmp_path / "out")
    assert made.manifest.kind == "encoder"
    run, graph = made.in_onnxruntime(), captured_runner(load_weights(made.captured))
    for mask in MASKS:
        feeds = feeds_of(mask)
        with torch.no_grad():
            want = model(**feeds).logits
        assert want.shape == (len(mask), 1)
        assert close(graph(feeds)["logits"], want) and close(run(feeds)["logits"], want)


def test_a_quantized_reranker_is_validated(tmp_path):
    folder = save(tmp_path / "model", AutoModelForSequenceClassification, num_labels=1)
    result = exports.exporting.export(folder, "w8a16", out_dir=tmp_path / "out", calibration="random")
    assert {p.name: p.scheme for p in result.plan}["score"] is None
    report = validate(result.folder, folder, windows=4)
    assert not report.problems and report.outputs[0].name == "logits" and report.outputs[0].sqnr_db > 30


def test_every_token_is_classified(tmp_path):
    folder = save(tmp_path, AutoModelForTokenClassification, num_labels=3)
    captured = load_weights(capture_model(folder))
    assert {p.name: p.dims for p in captured.outputs} == {"logits": ("batch_size", "sequence_length", 3)}
    model = AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="eager").eval()
    feeds = feeds_of(MASKS[1])
    with torch.no_grad():
        want = model(**feeds).logits[MASKS[1].bool()]
    assert close(captured_runner(captured)(feeds)["logits"][MASKS[1].bool()], want)


def test_without_a_head_there_are_hidden_states(tmp_path):
    folder = save(tmp_path, AutoModel)
    captured = capture_model(folder)
    assert captured.kind == "encoder" and [p.name for p in captured.outputs] == ["last_hidden_state"]
    (note,) = [note for note in captured.notes if "hidden states" in note]
    assert "names Qwen3Model" in note and note.endswith("set architectures to Qwen3ForCausalLM")


def test_only_a_decoder_without_its_head_is_said_to_give_hidden_states():
    said = {
        (name, *changes): bool(note_on_bare(AutoConfig.for_model(kind, architectures=[name], **dict(changes))))
        for kind, name, *changes in [
            ("llama", "LlamaModel"), ("llama", "LlamaForCausalLM"), ("llama", "LlamaForSequenceClassification"),
            ("bert", "BertModel"), ("bert", "BertModel", ("is_decoder", True)), ("vit", "ViTModel"),
        ]
    }  # fmt: skip
    assert [key for key, noted in said.items() if noted] == [("LlamaModel",), ("BertModel", ("is_decoder", True))]


def test_a_score_without_a_token_for_padding_is_refused(tmp_path):
    folder = save(tmp_path, AutoModelForSequenceClassification, num_labels=1)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CaptureError, match="has no pad_token_id to tell that from padding. Set pad_token_id"):
        capture_model(folder)


def test_a_class_that_transformers_does_not_know_is_refused(tmp_path, model_folder):
    from qexport.models.source import open_model

    model = open_model(model_folder("llama"))
    model.config.architectures = ["LlamaForRewards"]
    with pytest.raises(CaptureError, match="names LlamaForRewards, which is neither a language model nor a classifier"):
        capture_model(model)
    model.config.architectures = ["MyLlamaForCausalLM"]
    assert capture_model(model).kind == "decoder"
