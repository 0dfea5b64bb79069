"""Prompts through int8 products: a file with two branches, of which each computes what its graph says.

See test_agreement.py for what agreeing means.
"""

import json
from collections import Counter

import onnx
import pytest
import torch

from helpers import agreement
from helpers.agreement import ROUNDING, STEP
from helpers.breadth import quick
from helpers.exports import session_runner
from helpers.pass_runs import block_of
from helpers.runners import block_runner, next_feeds, padded, prompt_feeds, tokens
from qexport import optimize
from qexport.api.exporting import export as export_model
from qexport.api.validating import validate
from qexport.artifact.branches import PROMPTS, STEPS, only
from qexport.artifact.manifest import CPU, MODEL_FILE
from qexport.errors import RecipeError
from qexport.graph.sites import linears
from qexport.lower.prefill_twin import LONGEST_STEP, prompt_twin
from qexport.quant.expand import channel_scale, expand_to_int8
from qexport.quant.formats import IntegerFormat
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section
from qexport.runtime.decoder import open_decoder
from qexport.runtime.session import open_session, optimized_graph, unfused

PROMPT_MASK, STEP_MASK = padded([12, 9, 10], "left"), padded([7, 4, 6], "left")
QUICK = ("zero points", "level 1", "2 bits", "biases, tied embedding", "branch", "mixed")
CASES = {
    "groups": ("llama", dict(scheme="w4a16_g32")),
    "zero points": ("llama", dict(scheme="w4a16_g32_asym", lm_head="w4a16_g32")),
    "8 bits": ("qwen2", dict(scheme="w8a16_g32")),
    "level 1": ("llama", dict(scheme="w4a16_g16", accuracy_level=1)),
    "2 bits": ("llama", dict(scheme="w2a16_g32_asym")),
    "biases, tied embedding": ("llama_bias", dict(scheme="w4a16_g32", lm_head="w4a16_g32")),
    "parallel residual": ("gpt_neox", dict(scheme="w4a16_g32")),
    "smoothed": ("llama", dict(scheme="w4a16_g32", smooth=section("smooth", method="smoothquant"))),
    "branch": ("llama", dict(scheme="w4a16_g32", lorc=section("lorc", rank=4))),
    "mixed": (
        "llama",
        dict(
            scheme="w4a16_g32",
            overrides=(
                Override(match="*.0.mlp.down_proj", scheme="w8a8_static"),
                Override(match="*.0.mlp.*", scheme="w8a8_dyn"),
                Override(match="*.1.self_attn.*", scheme="float"),
                Override(match="*.1.mlp.gate_proj", scheme="nf4"),
            ),
        ),
    ),
}


def recipe_of(**fields):
    return Recipe(calibration=CalibrationSpec(source="random", samples=4, sequence_length=16), prefill="int8", **fields)


@pytest.fixture
def export(captured, tmp_path):
    def make(family="llama", name="out", **fields):
        return agreement.export(
            captured(family), recipe_of(**({"scheme": "w4a16_g32"} | fields)), "cpu", tmp_path / name
        )

    return make


def branch_runner(exported, prefix):
    """One branch for every call, its results holding what every block hands on besides."""
    model = only(onnx.load(exported.folder / MODEL_FILE, load_external_data=False), prefix)
    present = {value.name for value in model.graph.output}
    names = [entry.output for entry in exported.manifest.blocks if entry.output not in present]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    path = exported.folder / "branch.onnx"
    onnx.save(model, path)
    return session_runner(open_session(path, exported.manifest, threads=1, provider=CPU))


def block_differences(exported, blocks, prefix, mask):
    """As `agreement.differences`, for one call through one branch."""
    feeds = prompt_feeds(exported.captured, tokens(*mask.shape), mask)
    return agreement.block_differences(exported, blocks, feeds, branch_runner(exported, prefix)(feeds))


@pytest.mark.by_default("zero points", "biases, tied embedding", "branch", "mixed")
@pytest.mark.parametrize("case", quick(QUICK, among=CASES))
def test_each_branch_computes_what_its_graph_says_in_its_kernels(export, case):
    family, fields = CASES[case]
    exported = export(family, **fields)
    for blocks, prefix in ((exported.prompts, PROMPTS), (exported.blocks, STEPS)):
        different = block_differences(exported, blocks, prefix, PROMPT_MASK)
        assert (different > ROUNDING).float().mean() <= 0.1
        assert different.max() < STEP
    assert unfused(optimized_graph(exported.folder, exported.manifest), exported.manifest.linears) == []
    inside = [entry for entry in exported.manifest.linears if entry.prompt_kernel]
    # Of nf4 there is one form, MatMulNBits too: its values are looked up when the file is loaded.
    in_groups = [entry for entry in inside if entry.kernel == "MatMulNBits" and entry.scheme.startswith("w")]
    assert in_groups and all(entry.prompt_kernel == "MatMulIntegerToFloat" for entry in in_groups)
    assert all(entry.prompt_kernel == entry.kernel for entry in inside if entry not in in_groups)


def test_the_number_of_new_tokens_chooses(export):
    exported = export()
    run = exported.in_onnxruntime()
    prompts, steps = branch_runner(exported, PROMPTS), branch_runner(exported, STEPS)
    for length, chosen, other in ((LONGEST_STEP, steps, prompts), (LONGEST_STEP + 1, prompts, steps)):
        mask = padded([length, length - 2], "left")
        feeds = prompt_feeds(exported.captured, tokens(*mask.shape), mask)
        got = run(feeds)["logits"]
        assert torch.equal(got, chosen(feeds)["logits"])
        assert not torch.allclose(got, other(feeds)["logits"], atol=1e-4)


@pytest.mark.parametrize("attention", ["grouped", "standard"])
def test_steps_read_the_cache_that_the_prompt_wrote(captured, tmp_path, attention):
    """A shared cache goes through the If as one buffer: what a step makes of it is what the graphs make of it."""
    from helpers.exports import export

    exported = export(
        captured("llama"), recipe_of(scheme="w4a16_g32"), "cpu", tmp_path / "out", attention=attention
    )  # fmt: skip
    decoder = open_decoder(exported.folder, exported.manifest, threads=1, max_length=24)
    ids = tokens(1, 14)
    feeds = prompt_feeds(exported.captured, ids[:, :12], torch.ones(1, 12, dtype=torch.int64))
    ports = exported.captured.inputs, exported.captured.outputs
    results = block_runner(exported.prompts, *ports)(feeds)
    torch.testing.assert_close(torch.tensor(decoder.run(ids[:, :12].numpy())), results["logits"], atol=0.05, rtol=0)
    for place in (12, 13):
        feeds = next_feeds(feeds, results, ids[:, place])
        results = block_runner(exported.blocks, *ports)(feeds)
        got = torch.tensor(decoder.run(ids[:, place : place + 1].numpy()))
        torch.testing.assert_close(got, results["logits"], atol=0.05, rtol=0)


def test_the_file_holds_the_steps_of_an_export_without(captured, export, tmp_path):
    exported, plain = export(), agreement.export(
        captured("llama"), Recipe(scheme="w4a16_g32"), "cpu", tmp_path / "plain"
    )  # fmt: skip
    feeds = prompt_feeds(exported.captured, tokens(*STEP_MASK.shape), STEP_MASK)
    assert torch.equal(exported.in_onnxruntime()(feeds)["logits"], plain.in_onnxruntime()(feeds)["logits"])
    assert "prefill" in exported.manifest.numerics and "prefill" not in plain.manifest.numerics
    assert exported.manifest.settings["prompts_from"] == LONGEST_STEP + 1
    names = [[(entry.output, entry.node, entry.columns) for entry in e.manifest.linears] for e in (exported, plain)]
    assert names[0] == names[1]
    # Beside its 4 bits and a scale for 32 weights, each weight has 8 bits and each channel a scale.
    sizes = [sum(entry.bytes for entry in e.manifest.linears) for e in (exported, plain)]
    weights = sum(entry.shape[0] * entry.shape[1] + 4 * entry.shape[0] for entry in exported.manifest.linears)
    weights += 5 * len(exported.products())  # the zero point and the unit scale of its input
    assert sizes[0] == sizes[1] + weights


def test_smoothing_is_for_the_inputs_of_prompts(export):
    changed = json.loads((export(smooth=section("smooth", method="smoothquant")).folder / "report.json").read_text())
    assert all("SmoothQuant" in block["changed"] for block in changed["export"]["blocks"][1:-1])


def test_validate_measures_prompts(export, model_folder):
    exported = export()
    report = validate(exported.folder, model_folder("llama"), windows=1, window=32)
    assert len(report.layers.linears) == len(exported.manifest.linears)
    assert not report.placement.unfused and not report.layers.moved
    assert any("prompts" in sentence for sentence in report.verdict)


def test_optimized_copies_keep_both_branches(export):
    exported = export()
    optimize(exported.folder, repeats=1)
    nodes = onnx.load(exported.folder / "optimized" / MODEL_FILE, load_external_data=False).graph.node
    kinds = [Counter(n.op_type for n in a.g.node) for node in nodes if node.op_type == "If" for a in node.attribute]
    assert any(kind["MatMulNBits"] for kind in kinds) and any(kind["MatMulIntegerToFloat"] for kind in kinds)


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_int8_weight_covers_each_channel(zero_points):
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 6)[:, None]
    w[3] = 0
    found = IntegerFormat(4, 16, symmetric=not zero_points).round_to_nearest(w)
    codes, scale = found.codes.t().contiguous(), found.scale.t().contiguous()
    zeros = None if found.zero_point is None else found.zero_point.t().contiguous()
    step = channel_scale(codes, scale, zeros, 16)
    wide = expand_to_int8(codes, scale, zeros, None, step, 16).double()
    values = found.dequantize().double().t()
    assert (wide.abs().amax(0)[[0, 1, 2, 4, 5]] == 127).all() and not wide[:, 3].any() and step[3] == 1
    assert ((wide * step - values).abs() <= 0.5001 * step).all()


def test_a_block_without_groups_has_no_twin():
    module = block_of(torch.nn.Linear(8, 16))
    assert linears(module.graph) and prompt_twin(module) is None


def test_refusals(captured, tmp_path, model_folder):
    with pytest.raises(RecipeError, match="not supported by the target cuda"):
        export_model(model_folder("llama"), recipe_of(scheme="w4a16_g32"), out_dir=tmp_path / "a", target="cuda")
    with pytest.raises(RecipeError, match="prefill is only for decoders"):
        export_model(
            torch.nn.Linear(32, 16), recipe_of(scheme="w4a16_g32"), out_dir=tmp_path / "b",
            example_inputs=(torch.randn(2, 32),),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scheme: w8a8_dyn\nprefill: int8\n", "weight-only linears in groups"),
        ("scheme: w4a16_g32\nlm_head: w8a16_pc\nprefill: int8\n", "w8a16_pc does not go with"),
        ("scheme: w4a16_g32\nlorc: {rank: 4, factors: int8}\nprefill: int8\n", "factors: float"),
        ("scheme: w4a16_g32\nprefill: int4\n", "prefill"),
    ],
)
def test_recipes_without_a_form(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        Recipe.load(tmp_path / "mine.yaml")
