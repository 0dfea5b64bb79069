"""Families beside those that every test runs on: captured they compute what transformers computes, or are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers.breadth import quick
from helpers.random_decoders import QUICK, REFUSED, VOCAB, breadth, reference_model, save_model
from helpers.random_modules import SEQ2SEQ, save_seq2seq
from helpers.runners import captured_runner, load_weights, next_feeds, padded, prompt_feeds, tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.capture.constants import fold_constants
from qexport.capture.module import capture_module
from qexport.capture.normalize import to_normal_form
from qexport.capture.seq2seq import capture_seq2seq
from qexport.capture.weight_views import WeightView, WeightViews, cut_weights
from qexport.errors import CaptureError, LoweringError
from qexport.graph.sites import linears
from qexport.graph.views import CachedAttention
from qexport.lower.check import check_translations
from qexport.models.checkpoint import Checkpoint
from qexport.models.source import open_model

PROMPTS = (padded([3, 7, 1], "left"), padded([7, 2, 5], "right"))
STEPS = 3
# Of the largest logit. transformers sums a delta rule in pieces of 64 tokens, and its rounding reaches experts' gates.
CLOSE, LOOSER = 1e-5, {"qwen3_5_moe": 3e-5}
REASONS = {
    "openai_gpt": "does not take a transformers cache",
}


def assert_computes_what_transformers_computes(captured, model, close=CLOSE):
    ours, theirs = captured_runner(captured), transformers_runner(model)
    for mask in PROMPTS:
        feeds = prompt_feeds(captured, tokens(*mask.shape, vocab=VOCAB), mask)
        for _ in range(1 + STEPS):
            got, want = ours(feeds), theirs(feeds)["logits"]
            real = feeds["attention_mask"][:, -want.shape[1] :].bool()
            assert want[real].isfinite().all()
            assert (got["logits"] - want)[real].abs().max() < close * want[real].abs().max()
            feeds = next_feeds(feeds, got, want[:, -1].argmax(-1))


@pytest.mark.by_default("gpt_oss", "bloom", "cohere", "longrope")
@pytest.mark.parametrize("family", breadth())
def test_blocks_compute_what_transformers_computes(captured, model_folder, family):
    model = load_weights(captured(family))
    close = LOOSER.get(family, CLOSE)
    assert_computes_what_transformers_computes(model, reference_model(model_folder(family)), close)
    assert model.reader.difference < 1e-4  # by the comparison that every export makes
    check_translations(block.module.graph for block in model.blocks)
    # Weights are read by linears and by nothing else that multiplies: none is left out of the plan.
    for block in model.blocks:
        for node in block.module.graph.nodes:
            if node.target in (torch.ops.aten.matmul.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                assert not any(a.op == "get_attr" and a.target not in model.constants for a in node.all_input_nodes)
        attends = any(CachedAttention.match(node) for node in block.module.graph.nodes)
        assert len(linears(block.module.graph)) >= (4 if attends else 2) or block in (model.blocks[0], model.blocks[-1])


@pytest.mark.parametrize("family", quick(REASONS.keys(), among=[n for n in REFUSED if n in REASONS]))
def test_what_cannot_be_exported_is_refused(tmp_path, family):
    with pytest.raises((CaptureError, LoweringError), match=REASONS[family]):
        check_translations(block.module.graph for block in capture_model(save_model(family, tmp_path / family)).blocks)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["openai_gpt", "xlm", "reformer", "prophetnet_decoder", "prophetnet"])
def test_without_a_cache_it_exports_as_a_module_as_the_refusal_says(family, tmp_path):
    pair = family in SEQ2SEQ
    (save_seq2seq if pair else save_model)(family, tmp_path / family)
    with pytest.raises(CaptureError, match="Without a cache it exports as an nn.Module"):
        capture_seq2seq(open_model(tmp_path / family)) if pair else capture_model(tmp_path / family)
    model = (AutoModelForSeq2SeqLM if pair else AutoModelForCausalLM).from_pretrained(tmp_path / family).eval()
    model.config.use_cache = False

    def feeds(*shape):
        read = {"input_ids": tokens(*shape, vocab=VOCAB), "attention_mask": padded([shape[1], 3], "right")}
        return read | ({"decoder_input_ids": tokens(shape[0], 5, vocab=VOCAB)} if pair else {})

    lengths = {"input_ids": "length", "attention_mask": "length", "decoder_input_ids": "written"}
    axes = {name: {0: "batch", 1: lengths[name]} for name in feeds(2, 7)}
    run = captured_runner(load_weights(capture_module(model, feeds(2, 7), axes)))
    for shape in ((2, 7), (2, 11)):
        with torch.no_grad():
            want, got = model(**feeds(*shape)).logits, run(feeds(*shape))["logits"]
        assert (got - want).abs().max() < CLOSE * want.abs().max()


@pytest.mark.slow
def test_layers_of_experts_are_traced_once_and_have_their_own_weights(tmp_path):
    folder = save_model("gpt_oss", tmp_path / "model", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    model = load_weights(capture_model(folder))
    assert_computes_what_transformers_computes(model, reference_model(folder))
    names = [name for name in model.blocks[4].parameters if ".experts." in name]
    assert "model.layers.3.mlp.experts.2.gate_up_proj.weight" in names and len(names) == 4 * 4


def test_a_piece_is_read_without_the_rest(model_folder, monkeypatch):
    model = capture_model(model_folder("gpt_oss"))
    assert isinstance(model.weights, WeightViews)
    whole = model.weights.checkpoint.load("model.layers.1.mlp.experts.down_proj")
    read = []
    load = model.weights.checkpoint.load
    monkeypatch.setattr(model.weights.checkpoint, "load", lambda *given: read.append(load(*given)) or read[-1])
    part = model.load("model.layers.1.mlp.experts.3.down_proj.weight")
    assert torch.equal(part, whole[3].t()) and read[0].shape == whole.shape[1:]


@pytest.mark.slow
def test_what_a_router_adds_to_its_scores_comes_from_the_checkpoint(tmp_path):
    """It is a buffer and no parameter, and trained all the same."""
    folder = save_model("glm4_moe", tmp_path / "model")
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file(weights | {name: torch.tensor([0.5, -100.0, 0.0, 1.0])}, folder / "model.safetensors", {"format": "pt"})
    model = load_weights(capture_model(folder))
    assert name in model.blocks[2].parameters and name not in model.constants
    assert_computes_what_transformers_computes(model, reference_model(folder))


def test_transposed_weights_are_turned_when_they_are_loaded(model_folder):
    model, reference = capture_model(model_folder("gpt2")), reference_model(model_folder("gpt2"))
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(model.load(name), reference.get_parameter(name).t())
    found = {linear.name: linear.shape for block in model.blocks for linear in linears(block.module.graph)}
    assert found[name.removesuffix(".weight")] == (192, 64)


@pytest.mark.slow
def test_short_factors_are_those_of_the_whole_model(model_folder, tmp_path):
    """What the refusal of longrope says to do gives the numbers of the unchanged model, for texts that are short."""
    folder = save_model("long_longrope", tmp_path / "long")
    reference = reference_model(folder)
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["max_position_embeddings"] = 32
    config["rope_parameters"]["factor"] = 4.0
    (short / "config.json").write_text(json.dumps(config))
    assert_computes_what_transformers_computes(load_weights(capture_model(short)), reference)


def test_what_constants_alone_decide_is_computed_once():
    """By functions that no file has: Gemma 3n cuts gates off at a share of a normal distribution."""

    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return x * torch.erfinv(2 * torch.tensor(0.7) - 1) + torch.erfinv(self.weight)

    x = torch.randn(3)
    whole = torch.export.export(Cut(), (x,)).module(check_guards=False)
    want = whole(x)
    fold_constants(to_normal_form(whole), {"weight"})
    whole.recompile()
    called = [node.target for node in whole.graph.nodes]
    assert called.count(torch.ops.aten.erfinv.default) == 1  # of the weight, which is not known yet
    assert torch.equal(whole(x), want)


def test_quick_families_are_there():
    assert set(QUICK) <= {p if isinstance(p, str) else p.values[0] for p in breadth()}


def test_matrices_one_below_another_are_weights_of_their_own(tmp_path):
    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (torch.nn.Linear(4, 6, bias=False) for _ in range(2))

        def forward(self, x):
            ups, downs = (part.weight.view(3, 2, 4) for part in (self.up, self.down))
            linear = torch.nn.functional.linear
            return sum(linear(linear(x, ups[i]), downs[i].t()) for i in range(3))

    x, module = torch.randn(5, 4), Stacked()
    whole = torch.export.export(module, (x,)).module(check_guards=False)
    want, weights = whole(x), {f"{part}.weight": getattr(module, part).weight.detach() for part in ("up", "down")}
    table = cut_weights(whole, set(weights))
    whole.recompile()
    assert torch.equal(whole(x), want)
    assert table == {
        f"{part}.{i}.weight": WeightView(f"{part}.weight", i, part == "down", 3)
        for part in ("up", "down") for i in range(3)
    }  # fmt: skip
    save_file(weights, tmp_path / "model.safetensors")
    views = WeightViews(Checkpoint(tmp_path), table)
    for name, piece in table.items():
        assert torch.equal(views.load(name), piece.of(weights[piece.source])), "only its rows are read"
