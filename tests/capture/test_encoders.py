"""Encoders from folders compute what transformers computes, on any batch, length and padding."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from helpers.random_modules import VOCAB, encoders, save_encoder
from helpers.runners import captured_runner, load_weights, padded, tokens
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.encoder_inputs import encoder_batch, encoder_stream
from qexport.calibrate.sources.samples import Samples
from qexport.errors import CaptureError, InputError
from qexport.graph.sites import fold_sites
from qexport.plan.model_plan import plan_for
from qexport.recipe.recipe import Recipe

MASKS = {
    "one token": torch.ones(1, 1, dtype=torch.int64),
    "three rows": torch.ones(3, 9, dtype=torch.int64),
    "padding": padded([6, 2, 9], "right"),
}


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    folder = save_encoder(request.param, tmp_path_factory.mktemp(request.param))
    return load_weights(capture_model(folder)), AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.by_default("modernbert", "roberta")
@pytest.mark.parametrize("pair", encoders(), indirect=True)
def test_blocks_compute_what_transformers_computes(pair):
    captured, model = pair
    run = captured_runner(captured)
    for mask in MASKS.values():
        feeds = encoder_batch(captured, tokens(*mask.shape, vocab=VOCAB), mask)
        with torch.no_grad():
            want, got = model(**feeds), run(feeds)
        assert list(got) == list(want)
        real = mask.bool()
        for name, value in got.items():
            rows = (value[real], want[name][real]) if value.dim() == 3 else (value, want[name])
            assert (rows[0] - rows[1]).abs().max() < 1e-5 * rows[1].abs().max()


@pytest.mark.parametrize("pair", ["bert", "roberta", "modernbert"], indirect=True)
def test_padding_changes_nothing(pair):
    captured, _ = pair
    run, ids = captured_runner(captured), tokens(1, 5, vocab=VOCAB)
    alone = run(encoder_batch(captured, ids, torch.ones_like(ids)))["last_hidden_state"]
    wide = torch.cat([torch.zeros_like(ids), ids], dim=1)  # padded on the left: goes to the right
    beside = run(encoder_batch(captured, wide, padded([5, 10], "left")[:1]))["last_hidden_state"]
    assert beside.shape[1] == 10 and (beside[:, :5] - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("pair", ["bert"], indirect=True)
def test_interface(pair):
    captured, _ = pair
    assert captured.kind == "encoder"
    assert {p.name: p.dims for p in captured.inputs} == dict.fromkeys(
        ["input_ids", "attention_mask", "token_type_ids"], ("batch_size", "sequence_length")
    )
    assert {p.name: p.dims for p in captured.outputs} == {
        "last_hidden_state": ("batch_size", "sequence_length", 64), "pooler_output": ("batch_size", 64)
    }  # fmt: skip
    assert [b.name for b in captured.blocks] == ["prologue", "encoder.layer.0", "encoder.layer.1", "epilogue"]
    assert captured.settings["vocab_size"] == VOCAB and captured.settings["max_position_embeddings"] == 64


HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"logits": ("batch_size", 3)}),
    "tokens": (AutoModelForTokenClassification, {"logits": ("batch_size", "sequence_length", 3)}),
    "answers": (
        AutoModelForQuestionAnswering,
        dict.fromkeys(["start_logits", "end_logits"], ("batch_size", "sequence_length")),
    ),
}  # fmt: skip


@pytest.mark.by_default("modernbert-tokens", "bert-sequence")
@pytest.mark.each_value_once
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_head_that_the_config_names_is_kept(tmp_path, family, head):
    loader, outputs = HEADS[head]
    folder = save_encoder(family, tmp_path, loader=loader, num_labels=2 if head == "answers" else 3)
    captured = capture_model(folder)
    assert captured.kind == "encoder" and {p.name: p.dims for p in captured.outputs} == outputs
    model = loader.from_pretrained(folder, attn_implementation="eager").eval()
    run = captured_runner(load_weights(captured))
    for mask in MASKS.values():
        feeds = encoder_batch(captured, tokens(*mask.shape, vocab=VOCAB), mask)
        with torch.no_grad():
            want, got = model(**feeds), run(feeds)
        for name, value in got.items():
            same = mask.shape == value.shape[:2] and head != "sequence"
            rows = (value[mask.bool()], want[name][mask.bool()]) if same else (value, want[name])
            assert (rows[0] - rows[1]).abs().max() < 1e-5 * rows[1].abs().max()


@pytest.mark.by_default("tokens")
@pytest.mark.parametrize("head", HEADS)
def test_what_makes_logits_takes_the_scheme_of_the_output_projection(tmp_path, head):
    captured = capture_model(save_encoder("bert", tmp_path, loader=HEADS[head][0]))
    name = "qa_outputs" if head == "answers" else "classifier"
    for asked in ("float", "w8a16_g32"):
        plan, _ = plan_for(captured, Recipe(scheme="w4a16_g32", lm_head=asked))
        given = {p.name: p.scheme.name if p.scheme else "float" for p in plan}
        assert given.pop(name) == asked and set(given.values()) == {"w4a16_g32"}


@pytest.mark.slow
def test_a_head_that_fills_masks_and_has_no_weights_is_left_out(tmp_path):
    strip(save_encoder("bert", tmp_path, loader=AutoModelForMaskedLM), "cls.predictions")
    captured = capture_model(tmp_path)
    assert [p.name for p in captured.outputs] == ["last_hidden_state"]
    assert captured.notes[0].startswith("has no cls.predictions") and "without the head" in captured.notes[0]


def test_a_head_without_weights_is_not_made_up(tmp_path):
    strip(save_encoder("bert", tmp_path, loader=AutoModelForSequenceClassification), "classifier")
    with pytest.raises(CaptureError, match="2 weights are not in the checkpoint, first classifier.bias"):
        capture_model(tmp_path)


def test_logits_of_texts_have_no_last_token(tmp_path):
    save_encoder("bert", tmp_path / "model", loader=AutoModelForTokenClassification)
    with pytest.raises(InputError, match="makes no logits of the token"):
        export(tmp_path / "model", "w4a16_g32_rtn", out_dir=tmp_path / "out", logits="last")


def test_what_a_model_reads_at_most_counts_its_padding_row(tmp_path):
    longest = {
        family: capture_model(save_encoder(family, tmp_path / family)).settings.get("max_position_embeddings")
        for family in ("bert", "roberta")
    }
    assert longest == {"bert": 64, "roberta": 62}


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["fnet"], indirect=True)
def test_a_model_without_a_mask_reads_texts_of_one_length(pair):
    captured, _ = pair
    assert [port.name for port in captured.inputs] == ["input_ids", "token_type_ids"]
    assert any("texts of one length" in note for note in captured.notes)
    mask = padded([4, 6, 4], "left")
    stream = encoder_stream(captured, Samples(tokens(3, 6, vocab=VOCAB) * mask, mask, ""), 2)
    assert [batch["input_ids"].shape for batch in stream.batches] == [(2, 4), (1, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["longformer"], indirect=True)
def test_tokens_of_mask_2_see_and_are_seen_by_all(pair):
    captured, model = pair
    ids, mask = tokens(2, 13, vocab=VOCAB), padded([13, 9], "right")
    mask[:, 0] = mask[0, 7] = 2
    with torch.no_grad():
        want = model(ids, mask.clamp(max=1), global_attention_mask=(mask == 2).long()).last_hidden_state[mask > 0]
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    got = captured_runner(captured)({port.name: feeds[port.name] for port in captured.inputs})["last_hidden_state"]
    assert (got[mask > 0] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.slow
def test_of_several_languages_the_config_names_one(tmp_path):
    captured = capture_model(save_encoder("xmod", tmp_path / "one"))
    assert any("reads de_DE, one of 2 languages" in note for note in captured.notes)
    assert not any("en_XX" in name for block in captured.blocks for name in block.parameters)
    with pytest.raises(CaptureError, match="default_language None.*one of en_XX, de_DE"):
        capture_model(save_encoder("xmod", tmp_path / "none", default_language=None))


def strip(folder, part):
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if part not in n}, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_a_pooler_without_weights_is_left_out(tmp_path):
    strip(save_encoder("bert", tmp_path), "pooler")
    captured = capture_model(tmp_path)
    assert [p.name for p in captured.outputs] == ["last_hidden_state"]
    assert not any("pooler" in name for b in captured.blocks for name in b.parameters)


@pytest.mark.slow
def test_a_weight_that_is_not_there_is_not_made_up(tmp_path):
    strip(save_encoder("bert", tmp_path), "layer.0.attention.self.key.weight")
    with pytest.raises(CaptureError, match=r"1 weights are not in the checkpoint, first encoder.layer.0.attention"):
        capture_model(tmp_path)


@pytest.mark.by_default("bert")
@pytest.mark.parametrize("pair", ["bert", "distilbert"], indirect=True)
def test_factors_pass_from_the_values_of_attention_to_what_reads_its_output(pair):
    sites = [site for block in pair[0].blocks for site in fold_sites(block.module.graph)]
    found = {site.consumers[0].name: site.producer.args[1].target for site in sites if site.kind == "rows"}
    assert len(found) == 2  # a layer each
    assert all("value" in made or "v_lin" in made for made in found.values()), found
