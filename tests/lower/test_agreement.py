"""The file computes in ONNX Runtime what its graph computes in PyTorch, for every scheme and target.

Float32 graphs agree to the rounding of float32, with one exception that belongs to quantization: an activation that
lies within that rounding of the middle between two codes may get one code here and the other there. It moves all
outputs of its token by a step, so tokens are counted and not tolerated one by one: block by block, on equal inputs, all
but a few agree to 1e-5, and those few differ by no more than a step. Over the whole model, where such a token goes on
to differ, what ONNX Runtime adds is measured against what quantization adds.

The CUDA files run here on the CPU provider: their kernels are other ones, what the nodes say is the same. In float16
the two round at different places, and float16 itself is the yardstick.
"""

import onnx
import pytest
import torch

from helpers.agreement import ROUNDING, assert_agree, assert_float16_adds_little, logits
from helpers.breadth import quick
from helpers.random_decoders import FAMILIES
from helpers.runners import captured_runner, load_weights, padded
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

SCHEMES = [
    "w4a16_g32", "w4a16_g64", "w4a16_g64_asym", "w4a16_g16_asym", "w4a16_pc", "w8a16_g32", "w8a8_dyn", "w8a8_static",
    "w4a8_g32", "w4a8", "w4a8_g32_static",
]  # fmt: skip
TARGETS = {"cpu": ("cpu", 4), "cpu, level 1": ("cpu", 1), "cuda": ("cuda", 4)}
PROMPTS = {"one row": padded([6], "left"), "three rows, padded": padded([9, 4, 6], "left")}


def recipe_of(scheme, level=4, method="rtn"):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    weights = section("weights", method=method)
    return Recipe(scheme=scheme, lm_head=scheme, accuracy_level=level, weights=weights, calibration=calibration)


def rounds_activations(scheme, level):
    return "a8" in scheme or level == 4


@pytest.mark.by_default(
    "w4a16_g32-*", "w4a16_g64_asym-*", "w8a8_dyn-*", "w8a8_static-*", "w4a8_g32_static-*", "w4a16_pc-*"
)  # fmt: skip
@pytest.mark.each_value_once
@pytest.mark.parametrize("mask", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_and_logits_agree(export, scheme, target, mask):
    name, level = target
    exported = export("llama", recipe_of(scheme, level), name, single=name == "cuda")
    level = level if name == "cpu" else 1
    flips = 0.02 if rounds_activations(scheme, level) else 0
    if scheme == "w4a8_g32" and level == 4:
        # Codes per token are rounded again per block: half the largest code of a block is the exact middle of two
        # codes there, and a token scale that differs in its last bit decides.
        flips = 0.08
    assert_agree(exported, mask, flips)

    float_model = captured_runner(load_weights(exported.captured))
    ran, graph, reference = logits(
        mask,
        *(
            (run, exported.captured, torch.float32)
            for run in (exported.in_onnxruntime(), exported.in_pytorch(), float_model)
        ),
    )
    if flips == 0:
        assert (ran - graph).abs().max() < ROUNDING * graph.abs().max()
    # Less than a thirtieth of the power of the quantization error, when tokens differ at all.
    assert sqnr_db(graph, ran) > sqnr_db(reference, graph) + 15


@pytest.mark.by_default("w4a16_g32", "w8a8_static")
@pytest.mark.parametrize("scheme", quick(("w4a16_g32", "w4a16_g64_asym", "w8a8_dyn", "w8a8_static"), among=SCHEMES))
def test_float16_of_the_cuda_file_adds_what_float16_adds(export, scheme):
    mask = PROMPTS["three rows, padded"]
    half, single = (export("llama", recipe_of(scheme), "cuda", single) for single in (False, True))
    assert half.manifest.dtype == "float16"
    assert_float16_adds_little(half, single, mask)


@pytest.mark.each_value_once
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_exactly_with_float_activations(export, family, target):
    exported = export(family, recipe_of("w4a16_g32", 1), target, single=target == "cuda")
    for mask in PROMPTS.values():
        assert_agree(exported, mask, flips=0)


@pytest.mark.by_default("gemma3-*", "opt-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w4a8_g32_static"])
@pytest.mark.parametrize("family", ["llama_bias", "opt", "gpt_neox", "gemma3"])
def test_biases_and_other_norms_agree_with_integer_activations(export, family, scheme):
    for target in ("cpu", "cuda"):
        exported = export(family, recipe_of(scheme), target, single=target == "cuda")
        assert_agree(exported, PROMPTS["three rows, padded"], flips=0.02)


def test_gptq_agrees(export):
    exported = export("llama_bias", recipe_of("w4a16_g32", method="gptq"), "cpu")
    assert_agree(exported, PROMPTS["three rows, padded"], flips=0.02)
    rounded = export("llama_bias", recipe_of("w4a16_g32"), "cuda")  # another folder; codes do not depend on the target
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight_codes"
    codes = [dict(e.blocks[1].module.named_buffers())[name] for e in (exported, rounded)]
    assert not torch.equal(*codes)


def test_masks_stay_finite_in_float16(export):
    """The lowest float32 is minus infinity in float16, and a row of padding alone would have no softmax."""
    exported = export("falcon_alibi", recipe_of("w4a16_g32"), "cuda")
    runs = (exported.in_onnxruntime(), exported.in_pytorch())
    ran, graph = logits(PROMPTS["three rows, padded"], *((run, exported.captured, torch.float16) for run in runs))
    assert torch.isfinite(graph).all() and sqnr_db(graph, ran) > 50


@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w8a8_static", "w4a8"])
def test_integer_products_on_cuda_have_128_input_features_at_least(export, scheme):
    graph = onnx.load(export("llama", recipe_of(scheme), "cuda").folder / "model.onnx", load_external_data=False).graph
    inputs = {node.input[1] for node in graph.node if node.op_type == "MatMulInteger"}
    padded = {node.output[0] for node in graph.node if node.op_type == "Pad"}
    assert inputs and inputs <= padded  # of 64 and 96 features
    assert len(padded) - len(inputs) == len({n.input[0] for n in graph.node if n.op_type == "MatMulInteger"})
