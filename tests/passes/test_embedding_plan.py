"""What becomes of the token embedding, and why, told from shapes; and the loop that hands its codes on."""

import json

import onnx
import pytest
import torch
from torch import nn

from helpers import exports
from helpers.agreement import assert_agree
from helpers.random_decoders import HIDDEN, VOCAB, reference_model, save_model
from helpers.runners import padded
from qexport.api import inspecting
from qexport.api.exporting import export
from qexport.api.validating import validate
from qexport.calibrate.sources import load_samples
from qexport.cli.printers.export import print_export
from qexport.cli.printers.inspect import print_inspection
from qexport.errors import PassError, RecipeError
from qexport.graph.edit import get_tensor
from qexport.passes.base import Context
from qexport.passes.embedding import ShareEmbedding
from qexport.plan.embedding_plan import token_embeddings
from qexport.plan.model_plan import plan_for
from qexport.quant.formats import IntegerFormat
from qexport.quant.gptq import gptq_quantize
from qexport.quant.hessian import HessianStatistic
from qexport.quant.hqq import hqq_quantize
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

RANDOM = CalibrationSpec(source="random", samples=4, sequence_length=16)
MASK = padded([9, 4, 6], "left")
TIED = dict(scheme="w4a16_g32", lm_head="w4a16_g32", embedding="tied", calibration=RANDOM)
GPTQ = section("weights", method="gptq")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A copy of a tied model without biases, which plans do not count."""
    return exports.capture(save_model("llama", tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)).copy


def inspect(model, recipe, target="cpu"):
    return inspecting.inspect(model, recipe, target=target)


def decided(captured, family, **fields):
    plan, (embedding,) = plan_for(captured(family), Recipe(**{"scheme": "w4a16_g32", **fields}))
    return embedding, plan[-1]


def test_codes_for_the_projection_alone_of_a_shared_table_are_said_to_grow_the_file(tied):
    _, (table,) = plan_for(tied(), Recipe(scheme="w4a16_g32", lm_head="w4a16_g32"))
    assert table.scheme is None and "the file holds it twice and grows: embedding: tied or auto" in table.reason
    _, (table,) = plan_for(tied(), Recipe(scheme="w4a16_g32"))
    assert "grows" not in table.reason


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gemma3", "opt", "gpt_neox", "phi3"])
def test_the_table_of_tokens_is_found_by_dataflow(captured, family):
    model = captured(family)
    (block, node) = next(
        (b, n) for b in model.blocks for n in token_embeddings(b.module.graph, model.input_node("input_ids", b))
    )
    assert block.name == "prologue" and "pos" not in node.args[0].target
    embedding, _ = decided(captured, family, embedding="w8a16_g32")
    assert embedding.weight == node.args[0].target and embedding.shape == (VOCAB, HIDDEN)
    assert (embedding.scheme.name, embedding.linear) == ("w8a16_g32", "")


def test_tied_takes_the_scheme_of_the_output_projection(captured):
    embedding, head = decided(captured, "llama_bias", lm_head="w8a16_g32_asym", embedding="tied")
    assert (embedding.scheme.name, embedding.linear, embedding.reason) == ("w8a16_g32_asym", "lm_head", "")
    assert embedding.bytes == VOCAB * (HIDDEN + HIDDEN // 32 * 5)
    assert (head.scheme.name, head.bytes, head.reason) == ("w8a16_g32_asym", 0, "reads the codes of model.embed_tokens")
    trained = section("weights", method="zq_local")
    _, head = decided(captured, "llama_bias", lm_head="w4a16_g128", embedding="tied", weights=trained)
    assert head.reason == (
        "64 input features do not divide into groups of 128: groups of 64; reads the codes of model.embed_tokens, "
        "which are rounded to nearest: zq_local does not apply"
    )


@pytest.mark.parametrize(
    "family, fields, reason",
    [
        ("llama", {"lm_head": "w4a16_g32"}, "its table is not the weight of the output projection"),
        ("llama_bias", {"overrides": [("lm_head", "float")]}, "lm_head, which it is tied to, stays in float: kept"),
        ("llama_bias", {"overrides": [("lm_head", "w8a8_dyn")]}, "is w8a8_dyn: no codes in groups"),
        ("llama_bias", {"overrides": [("lm_head", "w4a16_pc")]}, "is w4a16_pc: no codes in groups"),
        ("llama_bias", {"overrides": [("lm_head", "nf4")]}, "is nf4: no codes in groups"),
    ],
)
def test_why_nothing_is_shared(captured, tmp_path, capsys, family, fields, reason):
    overrides = [{"match": match, "scheme": scheme} for match, scheme in fields.pop("overrides", ())]
    fields |= {"embedding": "tied", "overrides": overrides}
    embedding, head = decided(captured, family, **fields)
    assert embedding.scheme is None and reason in embedding.reason and "reads the codes" not in head.reason
    recipe = Recipe(scheme="w4a16_g32", **fields)
    exported = exports.export(captured(family), recipe, "cpu", tmp_path / "out")
    report = json.loads((exported.folder / "report.json").read_text())["export"]["embedding"]
    assert [(e["name"], e["scheme"]) for e in report] == [("model.embed_tokens", "float")] and reason in report[0][
        "reason"
    ]


def test_groups_that_do_not_divide_the_width(captured):
    embedding, _ = decided(captured, "llama", embedding="w4a16_g512")
    assert embedding.scheme.name == "w4a16_g64" and "do not divide into groups of 512: groups of 64" in embedding.reason


def test_a_table_kept_twice_is_told(captured):
    embedding, _ = decided(captured, "llama_bias", embedding="w4a16_g32")
    assert embedding.reason == "lm_head keeps the same table in float, so the file holds it twice"
    assert decided(captured, "llama", embedding="w4a16_g32")[0].reason == ""


def test_a_model_without_token_ids(tmp_path):
    recipe, x = Recipe(scheme="w4a16_g32", embedding="w4a16_g32"), torch.randn(2, 32)
    with pytest.raises(RecipeError, match="embedding: the model looks up no rows by input_ids"):
        export(nn.Linear(32, 32), recipe, out_dir=tmp_path / "out", example_inputs=(x,))


def test_codes_that_no_block_has_made(captured):
    model = captured("llama_bias")
    plan, embeddings = plan_for(model, Recipe(**TIED))
    step, block = ShareEmbedding({e.linear: e for e in embeddings}), model.blocks[-1]
    assert [step.applies_to(b.module) for b in model.blocks] == [False, False, False, True]
    with pytest.raises(PassError, match=r"no block before this one has made model\.embed_tokens\.weight_codes"):
        step.call(block.module, Context())


# ---- what the loop does ---------------------------------------------------------------------------------------------


@pytest.mark.by_default("gptq", "hqq")
@pytest.mark.parametrize("method", ["rtn", "rtn, clipped", "hqq", "gptq"])
def test_how_the_codes_are_found(captured, model_folder, tmp_path, method):
    """GPTQ looks at what the float model hands to the output projection, which transformers tells."""
    model = captured("llama_bias")
    table, fmt = model.load("model.embed_tokens.weight"), IntegerFormat(4, 32)
    samples = load_samples(RANDOM, vocab_size=VOCAB)
    with torch.no_grad():
        hidden = reference_model(model_folder("llama_bias")).model(samples.input_ids).last_hidden_state
    statistic = HessianStatistic("token_norm", 0.5)
    statistic.update(hidden.flatten(0, 1))
    wanted = {
        "rtn": lambda: fmt.round_to_nearest(table),
        "rtn, clipped": lambda: fmt.round_to_nearest(table, clip_search=True),
        "hqq": lambda: hqq_quantize(table, fmt),
        "gptq": lambda: gptq_quantize(table, statistic.value(), fmt, damp=0.02, clip_search=True),
    }[method]()
    weights = {
        "rtn": {"method": "rtn"},
        "rtn, clipped": {"method": "rtn", "clip_search": True},
        "hqq": {"method": "hqq"},
        "gptq": {"method": "gptq", "damp": 0.02, "token_norm_power": 0.5, "clip_search": True, "act_order": True},
    }[method]
    exported = exports.export(model, Recipe(**TIED, weights=weights), "cpu", tmp_path / "out")
    for block in (exported.blocks[0], exported.blocks[-1]):
        codes, scale = (
            get_tensor(block.module, f"model.embed_tokens.weight_{part}").t() for part in ("codes", "scale")
        )
        if method == "gptq":  # sums in another order may move a code
            assert (codes == wanted.codes).float().mean() > 0.99 and (codes != fmt.round_to_nearest(table).codes).any()
            assert (scale == wanted.scale).float().mean() > 0.99
        else:
            assert torch.equal(codes, wanted.codes) and torch.equal(scale, wanted.scale)


def test_layers_are_calibrated_on_the_rounded_embedding(captured, tmp_path):
    recipe = Recipe(scheme="w4a16_g32", embedding="w2a16_g32", calibration=RANDOM, weights=GPTQ)
    blocks = {}
    for embedding in ("w2a16_g32", "float"):
        fields = recipe.model_copy(update={"embedding": embedding})
        exported = exports.export(captured("llama"), fields, "cpu", tmp_path / embedding)
        blocks[embedding] = json.loads((exported.folder / "report.json").read_text())["export"]["blocks"]
    assert blocks["w2a16_g32"][0]["changed"] == {"QuantizeEmbedding": [["model.embed_tokens", "w2a16_g32", {}]]}
    assert blocks["w2a16_g32"][1]["sqnr_db"] < blocks["float"][1]["sqnr_db"] - 5


@pytest.mark.slow
def test_going_on_after_the_embedding(model_folder, tmp_path):
    """The codes come out of the finished block on disk."""
    folder, recipe = model_folder("llama_bias"), Recipe(**TIED, weights=GPTQ)

    def stop(stage, what, done, total):
        if what == "epilogue":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(folder, recipe, out_dir=tmp_path / "out", progress=stop)
    resumed = export(folder, recipe, out_dir=tmp_path / "out", resume=True).folder
    whole = export(folder, recipe, out_dir=tmp_path / "whole").folder
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


# ---- what a user sees -----------------------------------------------------------------------------------------------


@pytest.mark.by_default(
    "*fields0-cpu", "*fields1-cuda", "*fields2-cuda", "*fields4-cpu", "*fields5-cuda", "*fields6-cpu"
)  # fmt: skip
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "family, fields",
    [
        ("tied", TIED),
        ("tied", TIED | {"lm_head": "w8a16_g32_asym"}),
        ("tied", {"scheme": "w4a16_g32"}),
        ("tied", {"scheme": "w4a16_g32", "lm_head": "w4a16_g32"}),
        ("tied", {"scheme": "w4a16_g32", "embedding": "w4a16_g16_asym"}),
        ("llama", {"scheme": "w4a16_g32", "lm_head": "w8a16_g32", "embedding": "w8a16_g64"}),
        ("gpt_neox", {"scheme": "w8a8_dyn"}),
    ],
)
def test_inspect_foretells_every_part(captured, tied, tmp_path, family, fields, target):
    recipe, model = Recipe(**fields), tied if family == "tied" else lambda: captured(family)
    foretold = inspect(model(), recipe, target)
    real = exports.export(model(), recipe, target, tmp_path / "out")
    parts = real.manifest.bytes
    assert foretold.bytes["embedding"] == parts["embedding"] == foretold.embeddings[0].bytes
    assert foretold.bytes["lm_head"] == parts["lm_head"]
    assert foretold.bytes["total"] == sum(foretold.bytes[p] for p in ("quantized", "embedding", "lm_head", "rest"))
    if fields["scheme"] == "w4a16_g32":
        assert foretold.bytes["quantized"] == parts["quantized_linears"]
    tensors = onnx.load(real.folder / "model.onnx", load_external_data=False).graph.initializer
    held = {tuple(e.value for e in t.external_data) or t.name: t for t in tensors}.values()
    size = sum(int(t.external_data[2].value) if t.external_data else len(t.raw_data) for t in held)
    assert 0 <= size - foretold.bytes["total"] < 2000, "shapes, positions, scales of activations"


def test_what_is_printed(captured, tmp_path, capsys):
    recipe = Recipe(**TIED, weights=GPTQ)
    print_inspection(inspect(captured("llama_bias"), recipe), all_layers=False)
    out = capsys.readouterr().out
    assert "Embedding of 128 x 64, 5,120 bytes: model.embed_tokens: w4a16_g32, which lm_head reads too" in out
    assert "  reads the codes of model.embed_tokens\n" in out
    assert "embedding 5.1 kB, the rest takes" in out

    def printed(family, recipe):
        print_export(export(captured(family), recipe, out_dir=tmp_path / family))
        return capsys.readouterr().out

    out = printed("llama_bias", recipe)
    assert "  model.embed_tokens: w4a16_g32, which lm_head reads too\n" in out and "embedding 5.1 kB, the rest" in out
    out = printed("llama", Recipe(scheme="w4a16_g32"))
    assert "embedding 32.8 kB, output projection 32.8 kB, the rest takes" in out
    assert "  model.embed_tokens: float, kept in float by the recipe\n" in out


def test_validation_of_a_tied_file(captured, tmp_path):
    recipe = Recipe(**TIED, lorc=section("lorc", rank=4))
    exported = exports.export(captured("llama_bias"), recipe, "cpu", tmp_path / "out")
    found = validate(exported.folder, exported.captured, windows=2, window=16)
    assert found.problems == () and found.layers.blocks[0].name == "prologue" and not found.layers.linears[-1].rescaled
    assert 15 < found.layers.blocks[0].sqnr_db < 30


def test_custom_passes_do_not_see_the_shared_projection(captured, tmp_path):
    """They may change everything else, and the file stays true to the graph."""
    from qexport.graph.sites import linears
    from qexport.passes.equalization.lae import LogEqualize

    plan, _ = plan_for(captured("llama_bias"), Recipe(scheme="w8a8_dyn", lm_head="w8a8_dyn"))
    step = LogEqualize({p.name: p for p in plan}, explicit=True)
    exported = exports.export(
        captured("llama_bias"), Recipe(**TIED, accuracy_level=1), "cpu", tmp_path / "out", extra_passes=(step,)
    )
    assert_agree(exported, MASK, flips=0)
    assert linears(exported.blocks[-1].module.graph) == []
