"""FP8, MXFP8, MXFP4 and NVFP4 weights: the file computes what its graph says, by the kernels that each target has."""

from collections import Counter
from unittest.mock import patch

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from helpers import agreement
from helpers.agreement import ROUNDING, assert_agree, logits
from helpers.cuda_placement.models import CUDA, PROMPT, assert_decoder_on_cuda
from helpers.runners import captured_runner, load_weights, padded
from qexport.errors import NumericsError
from qexport.graph.edit import get_tensor
from qexport.graph.schema import bind
from qexport.plan.linear_plan import LinearPlan, weight_bytes
from qexport.quant.formats import Scheme
from qexport.quant.formats.mxfp4 import MXFP4
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.session import optimized_graph, unfused

MASK = padded([9, 4, 6], "left")
FP4, FP8 = "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight"
KERNELS = {  # on the CPU, on CUDA
    "w8a16_fp8": ("MatMul", FP8), "w8a16_fp8_b128": ("MatMul", FP8), "w8a8_fp8": ("MatMul", FP8),
    "mxfp8": ("MatMul", FP8), "mxfp4": ("MatMulNBits", FP4), "nvfp4": ("MatMulNBits", FP4),
    "ternary_g32": ("MatMulNBits", "MatMulNBits"),
}  # fmt: skip
# Linears that read one value share its scale, which is the first one's.
INPUT_OWNERS = ("q_proj", "o_proj", "gate_proj", "down_proj", "lm_head")
CALIBRATION = CalibrationSpec(source="random", samples=4, sequence_length=16)
schemes = pytest.mark.parametrize("scheme", KERNELS)


@pytest.fixture
def export(export):
    def make(scheme, target="cpu", level=4, single=False, family="llama_bias"):
        recipe = Recipe(scheme=scheme, lm_head=scheme, accuracy_level=level, calibration=CALIBRATION)
        return export(family, recipe, target, single)

    return make


@pytest.mark.by_default("*w8a16_fp8_b128", "*w8a8_fp8", "*mxfp8", "*nvfp4", "*ternary_g32")
@schemes
@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.each_value_once
def test_the_file_computes_what_its_graph_says(export, scheme, level):
    exported = export(scheme, level=level)
    flips = 0.02 if level == 4 and KERNELS[scheme][0] == "MatMulNBits" else 0
    assert_agree(exported, MASK, flips=flips)
    runs = [exported.in_onnxruntime(), exported.in_pytorch(), captured_runner(load_weights(exported.captured))]
    ran, graph, reference = logits(MASK, *((run, exported.captured, torch.float32) for run in runs))
    if not flips:
        assert (ran - graph).abs().max() < ROUNDING * graph.abs().max()
    assert 1 < sqnr_db(reference, graph) < 50  # it is quantized


@pytest.mark.by_default("w8a8_fp8", "mxfp4", "ternary_g32", "mxfp8")
@schemes
def test_every_linear_is_its_kernel_on_the_cpu(export, scheme):
    """A weight that has no kernel of its own is unpacked when the file is loaded: nothing of that is left to a run."""
    exported = export(scheme)
    linears, graph = exported.manifest.linears, optimized_graph(exported.folder, exported.manifest)
    assert {entry.kernel for entry in linears} == {KERNELS[scheme][0]}
    assert unfused(graph, linears) == []
    found = graph.op_counts()
    products = len({entry.output for entry in linears})
    assert found[KERNELS[scheme][0]] == products and not {"Expand", "Transpose"} & set(found)
    assert "DequantizeLinear" not in found or scheme == "w8a8_fp8"  # of its inputs


@pytest.mark.by_default("w8a16_fp8_b128", "w8a8_fp8", "nvfp4", "ternary_g32")
@schemes
def test_every_node_is_on_cuda(export, cuda_placement, scheme):
    exported = export(scheme, "cuda")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    found = Counter(placed["optimized_ops"])
    assert {entry.kernel for entry in exported.manifest.linears} == {KERNELS[scheme][1]}
    assert found[KERNELS[scheme][1]] == len({entry.output for entry in exported.manifest.linears})
    assert not {"MatMul", "Gemm", "DequantizeLinear", "Expand"} & set(found)


@pytest.mark.by_default("nvfp4")
@pytest.mark.parametrize("scheme", ["w8a8_fp8", "nvfp4"])
def test_bfloat16_is_placed_too(new_export, cuda_placement, scheme):
    recipe = Recipe(scheme=scheme, lm_head=scheme, calibration=CALIBRATION)
    exported = new_export("llama", recipe, "cuda", dtype="bfloat16")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert placed["memcpy"] == 0 and placed["nodes"][CUDA][KERNELS[scheme][1]] == 15


@pytest.mark.by_default("*w8a8_fp8*", "*w8a16_fp8_b128*", "*mxfp4*", "*ternary_g32*")
@schemes
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.each_value_once
def test_planned_bytes_are_those_of_the_file(export, scheme, target):
    exported = export(scheme, target, family="llama")
    for entry in exported.manifest.linears:
        plan = LinearPlan(entry.name, entry.block, entry.shape, Scheme.parse(entry.scheme))
        input_scale = 4 if scheme == "w8a8_fp8" and entry.name.endswith(INPUT_OWNERS) else 0
        assert entry.bytes == weight_bytes(plan, exported.dtype.itemsize) + input_scale


def read_by(folder, op_type):
    """What each node of a type reads but for its input, by the node's name: attributes, and its constants by ONNX
    Runtime on the CPU."""
    model = onnx.load(folder / "model.onnx")
    nodes = [node for node in model.graph.node if node.op_type == op_type]
    del model.graph.output[:]
    wanted = [name for node in nodes for name in node.input[1:] if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted))
    made, needed = {name: node for node in model.graph.node for name in node.output}, []
    left = list(wanted)
    while left:
        if (node := made.get(left.pop())) is not None and node not in needed:
            needed.append(node)
            left += node.input
    kept = [node for node in model.graph.node if node in needed]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(kept)
    reads = {name for node in kept for name in node.input} | set(wanted)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in reads]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(tensors)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = dict(zip([o.name for o in session.get_outputs()], session.run_with_ort_values(None, {}), strict=True))
    return {
        node.name: ({a.name: a.i for a in node.attribute}, [got[name] for name in node.input[1:] if name])
        for node in nodes
    }  # fmt: skip


def test_scales_beyond_the_reach_of_cudas_kernel_are_refused(captured, tmp_path):
    """None that are found here are; those of a checkpoint may be."""
    spread = MXFP4.scales_for

    def wide(self, absmax):
        scale = spread(self, absmax)
        scale[0, 0] = 2.0**-40
        return scale

    with patch.object(MXFP4, "scales_for", wide), pytest.raises(NumericsError, match="further apart than 2.17"):
        agreement.export(captured("llama"), Recipe(scheme="mxfp4"), "cuda", tmp_path / "out")
    assert not (tmp_path / "out").exists()


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def fp4_weight(attributes, packed, scale, whole):
    """As the schema of MatMulBlockQuantizedFp4Weight says it, in float64."""
    packed, scale = packed.numpy(), scale.numpy().view(ml_dtypes.float8_e4m3fn).astype(float)
    table = np.array(E2M1 + [-value for value in E2M1])
    values = np.stack([table[packed & 15], table[packed >> 4]], -1).reshape(len(packed), -1)
    return values * scale.repeat(attributes["block_size"], 1) * float(whole.numpy())


def fp8_weight(attributes, weight, scale, input_scale=None):
    """As the schema of MatMulBlockQuantizedFp8Weight says it, in float64."""
    values = np.frombuffer(weight.numpy().tobytes(), ml_dtypes.float8_e4m3fn).reshape(weight.shape()).astype(float)
    return values * scale.numpy().astype(float).repeat(attributes["block_size"], 1)[:, : values.shape[1]]


@pytest.mark.by_default("w8a16_fp8_b128", "w8a8_fp8", "nvfp4")
@pytest.mark.parametrize("scheme", [name for name, (_, kernel) in KERNELS.items() if kernel in (FP4, FP8)])
def test_cudas_kernels_read_the_weight_of_the_graph(export, scheme):
    """Nothing computes here: what the kernels read is decoded by the words of their schemas."""
    exported = export(scheme, "cuda", family="llama")
    found = read_by(exported.folder, KERNELS[scheme][1])
    decode = fp4_weight if KERNELS[scheme][1] == FP4 else fp8_weight
    products = {
        node.meta["linear"]: node for block in exported.blocks for node in block.module.graph.nodes
        if "linear" in node.meta
    }  # fmt: skip
    assert found.keys() == products.keys() and len(found) == 15
    for name, (attributes, constants) in found.items():
        block = next(b for b in exported.blocks if products[name].graph is b.module.graph)
        given = bind(products[name])
        codes, scale, whole = (
            None if n is None else get_tensor(block.module, n.target)
            for n in (given.codes, given.scale, given.tensor_scale)
        )
        weight = torch.ops.qexport.dequantize_floats(codes, scale, whole, given.name).t().double()
        ours = torch.from_numpy(decode(attributes, *constants))
        assert (ours - weight).abs().max() <= 2**-23 * weight.abs().max()  # two products in float32
