"""Logits of the last token only: the last row of all of them, whatever stands around the output projection."""

import onnx
import pytest
import torch
from torch import nn

from helpers import agreement, exports
from helpers.agreement import assert_agree
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.runners import captured_runner, load_weights, next_feeds, padded, prompt_feeds, tokens
from qexport.api.exporting import export as export_model
from qexport.api.validating import validate
from qexport.errors import InputError, LoweringError
from qexport.graph.edit import call, shape_of
from qexport.lower.last_token import keep_last, read_by_projection
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.decoder import open_decoder
from qexport.validation.logits import deployed_logits

aten = torch.ops.aten
RANDOM = CalibrationSpec(source="random", samples=4, sequence_length=16)
MASK = padded([9, 4, 6], "left")
HEADS = {
    "float": dict(),
    "w4a16": dict(lm_head="w4a16_g32"),
    "tied": dict(lm_head="w8a16_g32", embedding="tied"),
    "dynamic": dict(lm_head="w8a8_dyn", smooth=section("smooth", explicit=True)),
    "static": dict(lm_head="w8a8_static"),
    "crossquant": dict(lm_head="w8a8_dyn", crossquant=section("crossquant")),
    "branch": dict(lm_head="w4a16_g32", lorc=section("lorc", rank=4, factors="int8")),
    "outliers": dict(lm_head="w8a8_dyn", llm_int8=section("llm_int8", threshold=2.0)),
}


def recipe_of(head):
    return Recipe(scheme="w4a16_g32", calibration=RANDOM, **HEADS[head])


def both(captured, recipe, target, folder, single=False):
    """The same export with all logits and with the last ones."""
    made = []
    for which in ("all", "last"):
        fresh = captured()
        made.append(agreement.export(fresh, recipe, target, folder / which, single, logits=which))
    return made


def prompt_and_next(exported, ids):
    """Logits of a prompt and of one more token."""
    run, feeds = exported.in_onnxruntime(), prompt_feeds(exported.captured, ids, MASK, exported.dtype)
    first = run(feeds)
    second = run(next_feeds(feeds, first, ids[:, 0]))
    return first["logits"], second["logits"]


@pytest.mark.by_default("branch-*", "tied-*", "crossquant-*", "static-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("head", HEADS)
def test_they_are_the_last_row_of_all(captured, tmp_path, head, target):
    # In float16 the CPU provider, which runs it here, rounds at other places once a node stands between two others.
    whole, last = both(lambda: captured("llama_bias"), recipe_of(head), target, tmp_path, single=target == "cuda")
    ids = tokens(3, 9)
    (want, want_next), (got, got_next) = prompt_and_next(whole, ids), prompt_and_next(last, ids)
    assert got.shape == (3, 1, want.shape[2]) and got_next.shape == want_next.shape
    # Rows do not know of each other, but a kernel may sum one row in another order than many.
    assert (got[:, 0] - want[:, -1]).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(got_next, want_next)
    assert {p: s for p, s in whole.manifest.bytes.items() if p not in ("model", "rest")} == {
        p: s for p, s in last.manifest.bytes.items() if p not in ("model", "rest")
    }


@pytest.mark.by_default("gemma2", "opt")
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt", "gpt_neox", "phi3"])
def test_families(captured, tmp_path, family):
    """Gemma 2 caps its logits."""
    whole, last = both(lambda: captured(family), recipe_of("float"), "cpu", tmp_path)
    (want, _), (got, _) = prompt_and_next(whole, tokens(3, 9)), prompt_and_next(last, tokens(3, 9))
    assert (got[:, 0] - want[:, -1]).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_graph_computes_what_the_file_computes(captured, tmp_path, target):
    exported = agreement.export(
        captured("gemma2"), recipe_of("tied").model_copy(update={"accuracy_level": 1}), target, tmp_path / "out",
        single=target == "cuda", logits="last",
    )  # fmt: skip
    assert_agree(exported, MASK, flips=0)


def test_the_file_and_its_manifest_say_so(captured, tmp_path):
    whole, last = both(lambda: captured("llama"), recipe_of("w4a16"), "cpu", tmp_path)
    assert last.manifest.settings["logits"] == "last" and "logits" not in whole.manifest.settings
    shapes = [
        [
            d.dim_value or d.dim_param
            for d in onnx.load(e.folder / "model.onnx").graph.output[0].type.tensor_type.shape.dim
        ]
        for e in (whole, last)
    ]
    assert shapes == [["batch_size", "sequence_length", 128], ["batch_size", 1, 128]]


def test_generation_writes_the_same(captured, tmp_path):
    whole, last = both(lambda: captured("llama"), recipe_of("w4a16"), "cpu", tmp_path)
    prompts = [[5, 6, 7, 11, 3], [9, 4]]
    texts = [open_decoder(e.folder, threads=1).generate(prompts, max_new_tokens=8).tokens for e in (whole, last)]
    assert texts[0] == texts[1]


def test_every_node_is_on_cuda(captured, cuda_placement, tmp_path):
    exported = exports.export(captured("llama"), recipe_of("dynamic"), "cuda", tmp_path / "out", logits="last")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)


def test_what_compares_all_logits_refuses_the_file(captured, tmp_path):
    exported = exports.export(captured("llama"), recipe_of("float"), "cpu", tmp_path / "out", logits="last")
    for compare in (
        lambda: validate(exported.folder, exported.captured),
        lambda: deployed_logits(exported.folder, exported.manifest, 8),
    ):
        with pytest.raises(InputError, match="logits of the last token only.*Export it once more with logits all"):
            compare()


def test_models_without_such_logits(tmp_path):
    x = torch.randn(2, 32)
    with pytest.raises(InputError, match="makes no logits of the token"):
        export_model(nn.Linear(32, 32), "w4a16_g32_rtn", out_dir=tmp_path / "a", example_inputs=(x,), logits="last")
    with pytest.raises(InputError, match="unknown logits 'first'. Logits are all or last"):
        export_model(nn.Linear(32, 32), "w4a16_g32_rtn", out_dir=tmp_path / "b", example_inputs=(x,), logits="first")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_do_not_come_straight_from_a_linear(captured):
    model = captured("llama")
    block, logits = model.output_node("logits")
    with block.module.graph.inserting_after(logits):
        turned = call(block.module.graph, aten.softmax.int, (logits, 1), like=logits)
    block.module.graph.output_node().replace_input_with(logits, turned)
    with pytest.raises(InputError, match="do not come straight from a linear"):
        read_by_projection(model)


def test_a_value_that_is_handed_on_too(captured):
    model = captured("llama")
    value = read_by_projection(model)
    block, logits = model.output_node("logits")
    hidden = next(n for n in block.module.graph.nodes if n.name == value)
    output = block.module.graph.output_node()
    output.args = ((logits, hidden),)
    with pytest.raises(LoweringError, match=f"epilogue: {value}, .*no longer leads to the logits and nothing else"):
        keep_last(model, value)
    with pytest.raises(LoweringError, match="gone, "):
        keep_last(model, "gone")


def test_types_in_the_graph_follow(captured):
    model = load_weights(captured("gemma2"))
    keep_last(model, read_by_projection(model))
    block, logits = model.output_node("logits")
    assert shape_of(logits)[1] == 1 and model.outputs[0].dims == ("batch_size", 1, 128)
    run, feeds = captured_runner(model), prompt_feeds(model, tokens(3, 9), MASK)
    assert run(feeds)["logits"].shape == (3, 1, 128)
