"""2-bit and 3-bit weights, and groups longer than the kernel's blocks: exact, fused, of the size that was planned."""

from collections import Counter

import onnx
import pytest
import torch

from helpers import agreement, exports
from helpers.agreement import ROUNDING, assert_agree, assert_float16_adds_little, differences
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.random_decoders import save_model
from helpers.runners import padded
from qexport.graph.edit import is_call
from qexport.plan.linear_plan import LinearPlan, weight_bytes
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.session import optimized_graph, unfused

ops = torch.ops.qexport
MASK = padded([9, 4, 6], "left")
SCHEMES = [
    "w2a16_g16", "w2a16_g16_asym", "w2a16_g32_asym", "w2a16_g64", "w2a16_g128_asym", "w2a16_g256", "w2a16_g512_asym",
    "w2a16_g16_mid", "w3a16_g512_mid", "w3a16_g32", "w3a16_g512_asym", "w5a16_g32_asym", "w6a16_g32",
    "w4a16_g512", "w4a16_g1024", "w4a16_g1024_asym", "w8a16_g512", "w4a8_g512_static",
    "nf4_g1024",
]  # fmt: skip
WRITTEN = ["w2a16_g16", "w2a16_g128_asym", "w4a16_g512", "w4a16_g1024_asym"]  # as MatMulNBits, not as DequantizeLinear


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A decoder of one layer with 1024 input features in down_proj and 256 in every other linear."""
    changes = dict(hidden_size=256, head_dim=64, intermediate_size=1024, num_hidden_layers=1)
    return exports.capture(save_model("llama", tmp_path_factory.mktemp("wide"), **changes))


@pytest.fixture
def export(wide, tmp_path):
    def make(scheme, target="cpu", level=4, single=False):
        calibration = CalibrationSpec(source="random", samples=2, sequence_length=16)
        recipe = Recipe(scheme=scheme, lm_head=scheme, accuracy_level=level, calibration=calibration)
        return agreement.export(wide, recipe, target, tmp_path / f"{target}{single}", single)

    return make


def products(exported):
    """By name of the linear, the node of its product."""
    nodes = (node for block in exported.blocks for node in block.module.graph.nodes)
    return {node.meta["linear"]: node for node in nodes if "linear" in node.meta}


def written_nodes(exported):
    model = onnx.load(exported.folder / "model.onnx")
    assert model.ir_version <= 13 and {e.domain for e in model.opset_import} == {"", "com.microsoft"}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        node.name: ({a.name: a.i for a in node.attribute}, [tensors[name] for name in node.input[1:]])
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }


@pytest.mark.by_default(
    "w2a16_g16", "w2a16_g128_asym", "w2a16_g16_mid", "w3a16_g32", "w3a16_g512_asym", "w5a16_g32_asym", "w6a16_g32",
    "w4a16_g1024_asym", "nf4_g1024", "w4a8_g512_static"
)  # fmt: skip
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_computes_what_its_graph_says(export, scheme):
    rounded = export(scheme)
    assert_agree(rounded, MASK, flips=0.03)


@pytest.mark.by_default("w2a16_g512_asym", "w3a16_g32", "w6a16_g64_asym", "w8a16_g512")
@pytest.mark.parametrize(
    "scheme",
    [
        "w2a16_g16_asym", "w2a16_g64", "w2a16_g512_asym", "w3a16_g32", "w5a16_g32", "w6a16_g64_asym", "w4a16_g512",
        "w8a16_g512", "nf4_g1024",
    ],  # fmt: skip
)
def test_float_activations_agree_to_rounding(export, scheme):
    assert_agree(export(scheme, "cpu", 1), MASK, flips=0)


@pytest.mark.parametrize("scheme", ["w2a16_g64", "w2a16_g128_asym", "w6a16_g64", "w4a16_g1024_asym"])
def test_the_cuda_file_computes_what_its_graph_says(export, scheme):
    assert_agree(export(scheme, "cuda", single=True), MASK, flips=0)


@pytest.mark.parametrize("scheme", ["w2a16_g64", "w4a16_g512"])
def test_float16_adds_what_float16_adds(export, scheme):
    half, single = export(scheme, "cuda"), export(scheme, "cuda", single=True)
    assert_float16_adds_little(half, single, MASK)


@pytest.mark.parametrize("scheme, block", [("w2a16_g64", 64), ("w2a16_g256", 128), ("w2a16_g16", None)])
def test_the_graph_shows_where_2_bit_kernels_round_their_input(export, scheme, block):
    exported = export(scheme)
    for product in products(exported).values():
        assert is_call(product, ops.matmul_nbits.default)
        rounds = is_call(product.args[0], ops.matmul_nbits_input.default)
        assert rounds == (block is not None) and (not rounds or product.args[0].args[1] == block)
    levels = {size["accuracy_level"] for size, _ in written_nodes(exported).values()}
    assert levels == {4 if block else 1}
    if block:  # and they do: without it the two differ in most tokens
        for piece in exported.blocks:
            for node in list(piece.module.graph.nodes):
                if is_call(node, ops.matmul_nbits_input.default):
                    node.replace_all_uses_with(node.args[0])
            piece.module.recompile()
        assert (differences(exported, MASK) > ROUNDING).float().mean() > 0.3


@pytest.mark.parametrize("scheme", WRITTEN)
def test_what_the_nodes_hold(export, scheme):
    """Codes from the lowest bits up; scales and zero points once for every block of a longer group."""
    exported = export(scheme, level=1)
    size, tensors = written_nodes(exported)["model.layers.0.mlp.down_proj"]
    bits = Scheme.parse(scheme).weight.stored_bits
    block = {"w2a16_g16": 16, "w2a16_g128_asym": 128}.get(scheme, 256)
    assert size == {"K": 1024, "N": 256, "bits": bits, "block_size": block, "accuracy_level": 1}
    packed, scale = (torch.from_numpy(t.copy()) for t in tensors[:2])
    codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1).view(256, 1024)
    zero = torch.full((256, 1024 // block), 2 ** (bits - 1))
    if "asym" in scheme:
        rows = torch.from_numpy(tensors[2].copy())
        zero = torch.stack([(rows >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1).view(256, -1)
    blocks = codes.view(256, -1, block).float() - zero[:, : 1024 // block, None].float()
    weight = (blocks * scale[..., None]).view(256, 1024)
    product = products(exported)["model.layers.0.mlp.down_proj"]
    module = next(b.module for b in exported.blocks if b.name == "model.layers.0")
    arguments = [a if not hasattr(a, "target") else module.get_buffer(a.target) for a in product.args[1:]]
    identity = torch.eye(1024)
    assert torch.equal(ops.matmul_nbits(identity, *arguments), identity @ weight.t())


@pytest.mark.parametrize(
    "scheme", ["w2a16_g64", "w2a16_g16_asym", "w3a16_g32", "w6a16_g32", "w4a16_g512", "w4a8_g512_static"]
)
def test_every_linear_is_its_kernel_on_the_cpu(export, scheme):
    exported = export(scheme)
    linears, graph = exported.manifest.linears, optimized_graph(exported.folder, exported.manifest)
    assert {entry.kernel for entry in linears} == {"MatMulNBits"}
    assert unfused(graph, linears) == []
    assert graph.op_counts()["MatMulNBits"] == 5 and len(linears) == 8
    assert not {"MatMul", "Gemm", "BitwiseOr"} & set(graph.op_counts())


def test_biases_of_written_kernels(captured, tmp_path):
    exported = exports.export(captured("llama_bias"), Recipe(scheme="w2a16_g32_asym"), "cpu", tmp_path / "cpu")
    assert_agree(exported, MASK, flips=0.03)
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, exported.manifest.linears) == []
    assert graph.op_counts()["MatMulNBits"] == 8 and len(exported.manifest.linears) == 14


@pytest.mark.parametrize("scheme", ["w2a16_g64", "w2a16_g128_asym", "w3a16_g32", "w4a16_g512"])
def test_every_node_is_on_cuda(export, cuda_placement, scheme):
    exported = export(scheme, "cuda")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    found = Counter(placed["optimized_ops"])
    assert found["MatMulNBits"] == 5 and not {"MatMul", "Gemm"} & set(found)


@pytest.mark.by_default(
    "w2a16_g128_asym-cuda", "w2a16_g32_mid_s8-cpu", "w5a16_g32_asym-cuda", "nf4_g512-cpu", "w4a8_g512_int-cuda",
    "w3a8_g64_asym_int-cpu"
)  # fmt: skip
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "scheme",
    [
        "w2a16_g128_asym", "w2a16_g32_mid_s8", "w3a16_g32", "w5a16_g32_asym", "w6a16_g512_s8", "w4a16_g1024_asym",
        "nf4_g512", "w8a8_dyn", "w4a8_g512_int", "w3a8_g64_asym_int",
    ],  # fmt: skip
)
def test_planned_bytes_are_those_of_the_file(export, scheme, target):
    exported = export(scheme, target)
    for entry in exported.manifest.linears:
        plan = LinearPlan(entry.name, entry.block, entry.shape, Scheme.parse(entry.scheme))
        # A few bytes of activations: a scale of one, and a zero point.
        assert 0 <= entry.bytes - weight_bytes(plan, exported.dtype.itemsize) <= (5 if "a8" in scheme else 0)
