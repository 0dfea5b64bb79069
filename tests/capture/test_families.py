"""A captured model computes what transformers computes, whatever the batch, the padding and the cache."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from helpers.breadth import quick
from helpers.random_decoders import FAMILIES, VOCAB, reference_model
from helpers.runners import captured_runner, load_weights, next_feeds, padded, prompt_feeds, tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.graph.edit import attributes, get_tensor
from qexport.models.checkpoint import Checkpoint

LAYERS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
PROMPTS = {
    "one token": torch.ones(1, 1, dtype=torch.int64),
    "batch": torch.ones(2, 7, dtype=torch.int64),
    "left padding": padded([3, 7, 1], "left"),
    "right padding": padded([7, 2, 5], "right"),
}
STEPS = 5


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, captured, model_folder):
    """A family's captured graph with its weights, and transformers' model."""
    return load_weights(captured(request.param)), reference_model(model_folder(request.param))


@pytest.mark.parametrize("mask", PROMPTS.values(), ids=PROMPTS)
def test_blocks_compute_what_transformers_computes(pair, mask):
    captured, model = pair
    ours, theirs = captured_runner(captured), transformers_runner(model)
    feeds = prompt_feeds(captured, tokens(*mask.shape, vocab=VOCAB), mask)
    for _ in range(1 + STEPS):
        got, want = ours(feeds), theirs(feeds)["logits"]
        real = feeds["attention_mask"][:, -want.shape[1] :].bool()
        # Both are float32; the sums are taken in another order.
        assert (got["logits"] - want)[real].abs().max() < 1e-5 * want[real].abs().max()
        feeds = next_feeds(feeds, got, want[:, -1].argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_token_gets_the_logits_of_an_uncached_one(captured, family):
    captured = load_weights(captured(family))
    run, ids, mask = captured_runner(captured), tokens(2, 9), padded([9, 4], "left")
    whole = run(prompt_feeds(captured, ids, mask))
    first = prompt_feeds(captured, ids[:, :8], mask[:, :8])
    last = run(next_feeds(first, run(first), ids[:, 8]))
    assert (last["logits"][:, 0] - whole["logits"][:, -1]).abs().max() < 1e-5 * whole["logits"].abs().max()
    for name in (n for n in whole if n.startswith("present")):
        assert last[name].shape == whole[name].shape
        assert (last[name] - whole[name])[mask[:, None].bool().expand(whole[name].shape[:3])].abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_named_by_module_path_and_hold_their_own_weights(captured, family):
    model = captured(family)
    container = LAYERS.get(family, "model.layers")
    layers = [f"{container}.{i}" for i in range(model.settings["num_hidden_layers"])]
    assert [b.name for b in model.blocks] == ["prologue", *layers, "epilogue"]
    for block in model.blocks[1:-1]:
        assert block.parameters and all(name.startswith(f"{block.name}.") for name in block.parameters)
    names = [n for b in model.blocks for n in b.parameters]
    assert len(set(names)) == len(names) - (model.tied.get(names[0], ()) != ())  # tied weights go by one name


@pytest.mark.parametrize("family", quick(["llama", "opt"], among=["llama", "llama_bias", "opt", "gemma3"]))
def test_capture_reads_no_weight(model_folder, monkeypatch, family):
    def refuse(self, name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(Checkpoint, "load", refuse)
    model = capture_model(model_folder(family))
    for block in model.blocks:
        weights = [get_tensor(block.module, n) for n in attributes(block.module.graph) if n not in model.constants]
        assert all(isinstance(weight, FakeTensor) for weight in weights)


def test_settings_and_interface(captured):
    model = captured("llama")
    assert model.settings == {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64,
        "vocab_size": 128, "max_position_embeddings": 128,
    }  # fmt: skip
    cache = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [p.name for p in model.inputs] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cache)
    ]  # fmt: skip
    assert [p.name for p in model.outputs] == ["logits", *(f"present.{name}" for name in cache)]
    assert model.outputs[1].dims == ("batch_size", 2, "total_sequence_length", 16)
