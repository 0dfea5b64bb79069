"""Methods whose graphs have forms of their own: the file computes what the graph says, and every product is fused.

See test_agreement.py for what agreeing means.
"""

from collections import Counter

import pytest
import torch

from helpers.agreement import assert_agree
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.runners import padded
from qexport import inspect
from qexport.recipe.recipe import ActivationSpec, CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import optimized_graph, unfused

MASK = padded([9, 4, 6], "left")
BEFORE = section("crossquant", row_scale="paper", round_weights="before_fold", explicit=True)
METHODS = {
    "crossquant": dict(scheme="w8a8_dyn", crossquant=section("crossquant", explicit=True)),
    "crossquant, paper rows": dict(scheme="w8a8_dyn", crossquant=section("crossquant", row_scale="paper")),
    "crossquant, two planes": dict(scheme="w8a8_dyn", crossquant=BEFORE),
    "crossquant, expanded": dict(scheme="w4a8_g32_int", crossquant=BEFORE),
    "crossquant, w4a4": dict(scheme="w4a4_g32_int", crossquant=BEFORE),
    "expanded": dict(scheme="w4a8_g32_int"),
    "expanded, zero points": dict(scheme="w4a8_g32_asym_int"),
    "expanded, static": dict(scheme="w4a8_g32_static_int"),
    "expanded, 3 bits": dict(scheme="w3a8_g32_int"),
    "w4a4": dict(scheme="w4a4"),
    "w8a4, static": dict(scheme="w8a4_static"),
}
KERNEL = {"cpu": "MatMulIntegerToFloat", "cuda": "MatMulInteger"}


def products_of(method):
    """Seven linears in each of two layers are four products, except where columns of the weights carry factors."""
    if method in ("crossquant, expanded", "crossquant, w4a4"):
        return 14
    return 16 if method == "crossquant, two planes" else 8


def recipe_of(**fields):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    return Recipe(calibration=calibration, **fields)


@pytest.fixture
def export(export):
    return lambda family, fields, target, single=False: export(family, recipe_of(**fields), target, single)


@pytest.mark.by_default(
    "crossquant, paper rows-*", "crossquant, two planes-*", "crossquant, expanded-*", "expanded, zero points-*",
    "expanded, static-*", "w4a4-*"
)  # fmt: skip
@pytest.mark.each_value_once
@pytest.mark.parametrize("target", KERNEL)
@pytest.mark.parametrize("method", METHODS)
def test_the_file_computes_what_its_graph_says(export, method, target):
    fields = METHODS[method]
    exported = export("llama_bias", fields, target, single=target == "cuda")
    # Codes of 4 bits are few and far between: one that differs moves its token by a fifteenth.
    step = 0.3 if "a4" in fields["scheme"] else 0.03
    assert_agree(exported, MASK, flips=0.03, step=step)


@pytest.mark.by_default("crossquant, paper rows", "crossquant, expanded", "expanded, static", "w4a4")
@pytest.mark.parametrize("method", METHODS)
def test_every_product_is_one_integer_matmul(export, method):
    exported = export("llama_bias", METHODS[method], "cpu")
    graph, linears = optimized_graph(exported.folder, exported.manifest), exported.manifest.linears
    assert unfused(graph, linears) == []
    planes = 2 if method == "crossquant, two planes" else 1
    assert all(len(entry.parts) == planes - 1 for entry in linears)
    assert graph.op_counts()["MatMulIntegerToFloat"] == products_of(method)
    # What expands the codes was done when the file was loaded.
    assert "Round" not in graph.op_counts()


@pytest.mark.by_default("crossquant, paper rows", "crossquant, expanded")
@pytest.mark.parametrize("method", ["crossquant, paper rows", "crossquant, two planes", "crossquant, expanded", "w4a4"])
def test_every_node_is_on_cuda(export, cuda_placement, method):
    exported = export("llama_bias", METHODS[method], "cuda")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    assert Counter(placed["optimized_ops"])["MatMulInteger"] == products_of(method)


@pytest.mark.by_default("cpu")
@pytest.mark.parametrize("target", KERNEL)
def test_crossquant_as_published(export, captured, target):
    fields = dict(scheme="w8a8_dyn", crossquant=section("crossquant", row_scale="dynamic"), accuracy_level=1)
    exported = export("llama", fields, target, single=target == "cuda")
    assert_agree(exported, MASK, flips=0.03)
    said = exported.manifest.numerics["slower_than_float"]
    assert said.startswith("14 of 15 linears are slower than in float32 and serve numerics only: crossquant with")
    assert said in inspect(captured("llama"), Recipe(**fields), target=target).warnings


@pytest.mark.by_default("w8a8_static")
@pytest.mark.parametrize("scheme", ["w8a8_dyn", "w8a8_static"])
def test_the_kernel_ablation_only_makes_zeros(export, scheme):
    fields = dict(scheme=scheme, activations=ActivationSpec(only_kernel=True), accuracy_level=1)
    exported = export("llama", fields, "cpu")
    assert_agree(exported, MASK, flips=0.02)
    assert optimized_graph(exported.folder, exported.manifest).op_counts()["MatMulNBits"] == 8


def test_float16_scales_of_expanded_codes_stay_float32(export):
    exported = export("llama", METHODS["crossquant, expanded"], "cuda")
    dtypes = {
        name.rpartition(".")[2]: tensor.dtype
        for block in exported.blocks
        for name, tensor in block.module.named_buffers()
        if name.endswith(("weight_scale", "column_factor", "row_scale"))
    }
    assert dtypes == dict.fromkeys(("weight_scale", "column_factor", "row_scale"), torch.float32)


def test_bytes_are_those_of_the_file(export):
    exported = export("llama", METHODS["crossquant, expanded"], "cpu")
    entry = next(e for e in exported.manifest.linears if e.name.endswith("gate_proj"))
    n, k = entry.shape
    codes, scales, factors, rows = n * k // 2, 4 * n * k // 32, 4 * k, 4 * n
    # gate and up share their input's constants, which count for the first of them
    assert entry.bytes - (codes + scales + factors + rows) in range(4 * k + 16)
