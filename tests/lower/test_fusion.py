"""Exported decoders become in ONNX Runtime what their manifest says: every linear its kernel, every node its place."""

from collections import Counter

import pytest

from helpers import exports
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.random_decoders import FAMILIES
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.session import optimized_graph, unfused

KERNELS = {  # on the CPU, on CUDA
    "w4a16_g32": ("MatMulNBits", "MatMulNBits"),
    "w4a16_g64": ("MatMulNBits", "MatMulNBits"),
    "w4a16_g16_asym": ("MatMulNBits", "MatMulNBits"),
    "w4a16_pc": ("MatMulNBits", "MatMulNBits"),
    "w8a16_g32": ("MatMulNBits", "MatMulNBits"),
    "w8a8_dyn": ("MatMulIntegerToFloat", "MatMulInteger"),
    "w8a8_static": ("MatMulIntegerToFloat", "MatMulInteger"),
    "w4a8_g32": ("MatMulNBits", "MatMulNBits"),
    "w4a8": ("MatMulIntegerToFloat", "MatMulInteger"),
    "w4a8_g32_static": ("MatMulNBits", "MatMulNBits"),
}
LINEARS = {"llama": 15, "llama_bias": 15, "opt": 13, "gpt_neox": 9, "phi3": 9, "gemma3": 22}


def products_of(exported):
    """q, k and v in one; o; gate and up in one (or no gate); down: four a layer, and the output projection."""
    return 4 * exported.captured.settings["num_hidden_layers"] + 1


@pytest.fixture
def export(export):
    def make(family, scheme, target):
        calibration = CalibrationSpec(source="random", samples=2, sequence_length=8)
        return export(family, Recipe(scheme=scheme, lm_head=scheme, calibration=calibration), target)

    return make


def assert_fused(exported, kernel):
    linears = exported.manifest.linears
    assert {entry.kernel for entry in linears} == {kernel}
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, linears) == []
    assert graph.op_counts()[kernel] == len(exported.products()) == products_of(exported)
    # Nothing is left of the weights' own nodes; a quantized input in front of MatMulNBits has one of each.
    assert not {"MatMulAddFusion", "Gemm", "MatMul"} & set(graph.op_counts())


def assert_on_cuda(exported, place, kernel):
    linears = exported.manifest.linears
    assert {entry.kernel for entry in linears} == {kernel}
    placed = place(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    ops = Counter(placed["optimized_ops"])
    assert ops[kernel] == products_of(exported)
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(ops)
    return ops


@pytest.mark.by_default("*w4a16_g16_asym", "*w4a16_pc", "*w8a8_dyn", "*w8a8_static", "*w4a8_g32_static")
@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("family", ["llama", "llama_bias"])
def test_every_linear_is_fused_on_the_cpu(export, family, scheme):
    exported = export(family, scheme, "cpu")
    assert len(exported.manifest.linears) == LINEARS[family]
    assert_fused(exported, KERNELS[scheme][0])


@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8_static"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("llama")])
def test_every_family_is_fused_on_the_cpu(export, family, scheme):
    exported = export(family, scheme, "cpu")
    assert len(exported.manifest.linears) == LINEARS.get(family, 15)
    assert_fused(exported, KERNELS[scheme][0])


@pytest.mark.by_default("w4a16_g16_asym", "w4a16_pc", "w8a8_dyn", "w8a8_static", "w4a8_g32_static")
@pytest.mark.parametrize("scheme", KERNELS)
def test_every_scheme_runs_on_cuda_without_a_node_on_the_cpu(export, cuda_placement, scheme):
    exported = export("llama_bias", scheme, "cuda")
    ops = assert_on_cuda(exported, cuda_placement, KERNELS[scheme][1])
    # One quantization for each value that linears share: two norms, o and down in both layers, and the last norm.
    assert ops["QuantizeLinear"] == (9 if "a8" in scheme else 0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama_bias"])
def test_every_family_runs_on_cuda_without_a_node_on_the_cpu(export, cuda_placement, family):
    exported = export(family, "w8a8_dyn", "cuda")
    ops = assert_on_cuda(exported, cuda_placement, "MatMulInteger")
    assert ops["GroupQueryAttention"] == exported.captured.settings["num_hidden_layers"]


def test_quantized_nodes_of_the_cpu_file_read_unsigned_activations(export):
    """Signed ones run up to 180 times slower on most x86 processors."""
    exported = export("llama", "w8a8_static", "cpu")
    model = exports.onnx.load(exported.folder / "model.onnx", load_external_data=False)
    types = {t.name: t.data_type for t in model.graph.initializer}
    zero_points = [node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(zero_points) == 9
    assert {types[name] for name in zero_points} == {exports.TensorProto.UINT8}
