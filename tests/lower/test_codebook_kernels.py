"""NF4 and FP4 weights: the file computes what its graph says, and every linear is the kernel that it is planned as.

That is a MatMulNBits of integers that are looked up at load where the CPU rounds inputs, else a MatMulBnb4.
"""

from collections import Counter

import onnx
import pytest
import torch

from helpers.agreement import ROUNDING, assert_agree, assert_float16_adds_little, logits
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.runners import captured_runner, load_weights, padded
from qexport import inspect
from qexport.graph.edit import get_tensor, is_call
from qexport.plan.linear_plan import LinearPlan, weight_bytes
from qexport.quant.formats import Scheme
from qexport.quant.formats.codebooks import decode_codebook
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.session import optimized_graph, unfused
from qexport.targets.cpu import CpuTarget

ops = torch.ops.qexport
SCHEMES = ["nf4", "fp4", "nf4_dq", "fp4_g32", "nf4_g16"]
TARGETS = {"cpu": ("cpu", 4), "cpu, level 1": ("cpu", 1), "cuda": ("cuda", 4)}
MASK = padded([9, 4, 6], "left")
CALIBRATION = CalibrationSpec(source="random", samples=4, sequence_length=16)


@pytest.fixture
def export(export):
    def make(scheme, target="cpu", level=4, single=False, family="llama_bias"):
        recipe = Recipe(scheme=scheme, lm_head=scheme, accuracy_level=level, calibration=CALIBRATION)
        return export(family, recipe, target, single)

    return make


@pytest.mark.by_default("nf4-*", "fp4_g32-*", "nf4_dq-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_computes_what_its_graph_says(export, scheme, target):
    name, level = target
    exported = export(scheme, name, level, single=name == "cuda")
    rounds = target == ("cpu", 4)
    assert_agree(exported, MASK, flips=0.02 if rounds else 0)
    runs = [exported.in_onnxruntime(), exported.in_pytorch(), captured_runner(load_weights(exported.captured))]
    ran, graph, reference = logits(MASK, *((run, exported.captured, torch.float32) for run in runs))
    if not rounds:
        assert (ran - graph).abs().max() < ROUNDING * graph.abs().max()
    assert 5 < sqnr_db(reference, graph) < 40  # it is quantized


def test_float16_adds_what_float16_adds(export):
    half, single = export("nf4", "cuda"), export("nf4", "cuda", single=True)
    assert_float16_adds_little(half, single, MASK)


@pytest.mark.parametrize("level, kernel", [(4, "MatMulNBits"), (1, "MatMulBnb4")])
@pytest.mark.parametrize("scheme", ["nf4", "fp4_g32"])
def test_every_linear_is_its_kernel_on_the_cpu(export, scheme, level, kernel):
    exported = export(scheme, level=level)
    linears, graph = exported.manifest.linears, optimized_graph(exported.folder, exported.manifest)
    assert {entry.kernel for entry in linears} == {kernel}
    assert unfused(graph, linears) == []
    assert graph.op_counts()[kernel] == len(linears) == 15
    # What makes integers of a table is folded when the file is loaded.
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(graph.op_counts())
    assert graph.op_counts()["Gather"] == 1  # of the embedding


SLOW = {
    ("nf4", 1): "15 of 15 linears are slower than in float32: the CPU has no fast kernel for tables of values",
    ("w8a16_g32", 1): "15 of 15 linears are slower than in float32: the CPU has no fast kernel for 8-bit weights",
    ("w8a16_pc", 1): "15 of 15 linears are slower than in float32: the CPU has no fast kernel for 8-bit weights",
    ("nf4", 4): "", ("w8a16_g32", 4): "", ("w4a16_g32", 1): "",
}  # fmt: skip


@pytest.mark.by_default("*'w8a16_g32'*", "*'w8a16_pc'*")
@pytest.mark.parametrize("asked", SLOW, ids=str)
def test_what_is_slower_than_float_is_said(captured, export, asked):
    scheme, level = asked
    recipe = Recipe(scheme=scheme, lm_head=scheme, accuracy_level=level)
    (warned,) = [w for w in inspect(captured("llama_bias"), recipe).warnings if "slower" in w] or [""]
    assert warned.startswith(SLOW[asked]) and bool(warned) == bool(SLOW[asked])
    assert export(scheme, level=level).manifest.numerics.get("slower_than_float", "") == warned


def test_products_of_few_outputs_with_8_bit_inputs_are_said_to_be_slow():
    def plan(*linears):
        return [LinearPlan(name, "", shape, scheme and Scheme.parse(scheme)) for name, shape, scheme in linears]

    head, wide = ("head", (16, 512), "w8a8_static"), ("wide", (17, 512), "w8a8_static")
    others = ("bytes", (2, 512), "w4a16_g32"), ("kept", (2, 512), None)
    said = CpuTarget().slower_than_float(plan(head, wide, *others))
    assert said.startswith("1 of 4 linears are slower than in float32") and "at most 16 outputs (head);" in said
    assert "(head, …)" in CpuTarget().slower_than_float(plan(head, ("gate", (1, 8), "w8a8_dyn")))
    assert CpuTarget().slower_than_float(plan(wide)) == ""
    both = CpuTarget(accuracy_level=1).slower_than_float(plan(head, ("table", (64, 64), "nf4")))
    assert both.count("slower than in float32") == 2 and "; 1 of 2" in both


def test_integers_of_a_table_cost_next_to_nothing(export):
    """Steps of 1/127 beside the 16 values of a block: less than a hundredth of the power of the quantization error."""
    exact, rounded = export("nf4", level=1), export("nf4", level=4)
    name = "model.layers.0.mlp.up_proj"
    product = next(n for n in rounded.blocks[1].module.graph.nodes if n.meta.get("linear") == name)
    codes, scale = (get_tensor(rounded.blocks[1].module, argument.target) for argument in product.args[1:3])
    table, integers = (decode_codebook(codes, scale, "nf4", 64, as_integers=kind) for kind in (False, True))
    weight = exact.captured.load(f"{name}.weight")
    assert sqnr_db(weight, table) - sqnr_db(weight, integers) < 0.05
    assert (table - integers).abs().max() <= scale.max() / 254 * (1 + 1e-6)


@pytest.mark.parametrize("scheme", ["nf4", "fp4_g32"])
def test_every_node_is_on_cuda(export, cuda_placement, scheme):
    exported = export(scheme, "cuda")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    found = Counter(placed["optimized_ops"])
    assert found["MatMulBnb4"] == 15 and not {"MatMul", "Gemm"} & set(found)


def test_nodes_keep_the_names_of_their_linears_and_the_weight_that_was_planned(export):
    exported = export("fp4_g32", level=1, family="llama")
    model = onnx.load(exported.folder / "model.onnx")
    domains = {entry.domain: entry.version for entry in model.opset_import}
    assert domains == {"": 23, "com.microsoft": 1} and model.ir_version <= 13
    nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMulBnb4"}
    assert set(nodes) == {entry.name for entry in exported.manifest.linears}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    node = nodes["model.layers.1.mlp.down_proj"]
    packed, absmax = (torch.from_numpy(tensors[name].copy()) for name in node.input[1:])
    size = {a.name: a.i for a in node.attribute}
    assert size == {"K": 96, "N": 64, "block_size": 32, "quant_type": 0}
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(64, 96)
    module = exported.blocks[2].module
    product = next(n for n in module.graph.nodes if n.meta.get("linear") == node.name)
    assert is_call(product, ops.matmul_bnb4.default)
    ours, scale = (get_tensor(module, argument.target) for argument in product.args[1:3])
    assert torch.equal(codes, ours)
    assert torch.equal(decode_codebook(codes, absmax.view(64, 3), "fp4", 32), decode_codebook(ours, scale, "fp4", 32))


@pytest.mark.parametrize("scheme, target", [("nf4", "cpu"), ("nf4_dq", "cuda")])
def test_planned_bytes_are_those_of_the_file(export, scheme, target):
    exported = export(scheme, target, family="llama")
    for entry in exported.manifest.linears:
        plan = LinearPlan(entry.name, entry.block, entry.shape, Scheme.parse(entry.scheme))
        assert entry.bytes == weight_bytes(plan, exported.dtype.itemsize)
    # 64 features take blocks of 64, 96 do not.
    shrunk = "nf4_g32" if scheme == "nf4" else "nf4_g32_dq"
    assert {(entry.shape[1], entry.scheme) for entry in exported.manifest.linears} == {(64, scheme), (96, shrunk)}
