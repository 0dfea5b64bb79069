"""Embeddings of texts as folders of sentence-transformers say they are made."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from helpers import exports
from helpers.random_decoders import LISTS, save_random
from helpers.random_modules import save_encoder
from helpers.runners import captured_runner, load_weights, padded, tokens
from qexport import validate
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.encoder_inputs import encoder_batch
from qexport.errors import InputError
from qexport.models.pooling import read_pooling

TYPES = "sentence_transformers.models"
MASK = padded([6, 2, 9], "right")


def describe(folder, pooling, *steps):
    """Write modules.json and what goes with it; steps: (type, files of its folder by name)."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{TYPES}.Transformer"}]
    for index, (kind, config) in enumerate([("Pooling", pooling), *steps], 1):
        path = f"{index}_{kind}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"{TYPES}.{kind}"})
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def by_hand(states, mask, mode):
    rows = [state[real.bool()] for state, real in zip(states, mask, strict=True)]
    weights = [torch.arange(1.0, len(row) + 1)[:, None] for row in rows]
    made = {
        "cls_token": [row[0] for row in rows], "lasttoken": [row[-1] for row in rows],
        "mean_tokens": [row.mean(0) for row in rows], "max_tokens": [row.amax(0) for row in rows],
        "mean_sqrt_len_tokens": [row.sum(0) / len(row) ** 0.5 for row in rows],
        "weightedmean_tokens": [(row * w).sum(0) / w.sum() for row, w in zip(rows, weights, strict=True)],
    }  # fmt: skip
    return torch.stack(made[mode])


@pytest.mark.by_default("modes0")
@pytest.mark.parametrize(
    "modes",
    [
        ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"],
        pytest.param(["mean_tokens"], marks=pytest.mark.slow),
    ],
)
def test_pooling_of_an_encoder(tmp_path, modes):
    folder = describe(save_encoder("distilbert", tmp_path), {f"pooling_mode_{mode}": True for mode in modes})
    captured = capture_model(folder)
    feeds = encoder_batch(captured, tokens(*MASK.shape), MASK)
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder).eval()(**feeds).last_hidden_state
        got = captured_runner(load_weights(captured))(feeds)["sentence_embedding"]
    want = torch.cat([by_hand(states, MASK, mode) for mode in modes], -1)
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.slow
def test_an_embedding_of_the_last_token_of_a_decoder(tmp_path):
    given = LISTS["families"]["qwen3"] | {"num_hidden_layers": 1}
    folder = save_random(given, tmp_path / "model", transformers.AutoModelForCausalLM)  # as Qwen3-Embedding is named
    activation = "torch.nn.modules.activation.Tanh"
    dense = {"in_features": 64, "out_features": 24, "bias": False, "activation_function": activation}
    describe(folder, {"pooling_mode": "lasttoken"}, ("Dense", dense), ("Normalize", {}))
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) / 8
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    result = exports.exporting.export(folder, "w8a16", out_dir=tmp_path / "out", calibration="random")
    assert "sentence_dense_0" in {p.name for p in result.plan}
    captured = capture_model(folder)
    assert captured.kind == "encoder"
    assert [p.name for p in captured.outputs] == ["last_hidden_state", "sentence_embedding"]
    feeds = encoder_batch(captured, tokens(*MASK.shape), MASK)
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()(**feeds)
        got = captured_runner(load_weights(captured))(feeds)["sentence_embedding"]
    want = torch.nn.functional.normalize(torch.tanh(by_hand(states.last_hidden_state, MASK, "lasttoken") @ weight.t()))
    assert got.shape == (3, 24) and (got - want).abs().max() < 2e-5
    report = validate(result.folder, folder, windows=6, window=16)
    found = {row.name: row for row in report.outputs}["sentence_embedding"]
    assert not report.problems and found.row_cosine > 0.999 and found.rank_correlation > 0.9


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([("WeightedLayerPooling", {})], "step 2 is WeightedLayerPooling, which is not supported"),
        ([("Dense", {"in_features": 64, "out_features": 8, "bias": True, "activation_function": "a.b.Wave"})],
         "has the activation Wave, which torch.nn does not have"),
        ([("Dense", {"in_features": 64})], "is not the config of a Dense step"),
    ],
)  # fmt: skip
def test_steps_that_are_not_known_are_refused(tmp_path, steps, why):
    with pytest.raises(InputError, match=why):
        read_pooling(describe(tmp_path, {"pooling_mode_mean_tokens": True}, *steps))


def test_other_ways_of_pooling_are_refused(tmp_path):
    for number, (pooling, why) in enumerate([
        ({"pooling_mode_median_tokens": True}, "pools by median_tokens"), ({}, "pools by nothing"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "leaves prompts out of the mean"),
    ]):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        with pytest.raises(InputError, match=why):
            read_pooling(describe(tmp_path / str(number), pooling))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "Transformer", "path": "../../etc"}]))
    with pytest.raises(InputError, match="names a folder outside its own"):
        read_pooling(tmp_path)
