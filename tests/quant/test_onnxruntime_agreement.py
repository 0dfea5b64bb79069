"""The grids are those of ONNX Runtime: quantized activations, dequantized weights, MatMulNBits at accuracy level 4."""

import platform

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qexport.quant.affine import blockwise_fake_quantize
from qexport.quant.formats import IntegerFormat
from qexport.quant.packing import pack_int4

# Float32 accumulation over at most 300 products leaves 4e-7; a single code that differs shows as 5e-5 or more.
TOLERANCE = 1e-6


def run(nodes, inputs, constants, output, output_type=TensorProto.FLOAT):
    def info(name, array):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        nodes,
        "agreement",
        [info(name, array) for name, array in inputs.items()],
        [helper.make_tensor_value_info(output, output_type, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def matmul_nbits(x, q, features):
    """y of MatMulNBits at accuracy level 4 for x [M, features] and a weight whose groups were padded with zeros."""
    codes = q.codes.to(torch.int32) + (2 ** (q.format.bits - 1) if q.format.symmetric else 0)
    codes = codes.to(torch.uint8).view(q.shape[0], -1, q.format.group_size)
    constants = {"scale": q.scale.numpy().reshape(-1)}
    if q.format.bits == 4:
        constants["b"] = pack_int4(codes).view(*codes.shape[:2], -1).numpy()
    else:
        constants["b"] = codes.numpy()
    inputs = ["x", "b", "scale"]
    if not q.format.symmetric:
        zero = q.zero_point
        if q.format.bits == 4:  # rows of zero points are packed separately
            zero = torch.stack([pack_int4(row) for row in zero])
        constants["zero"] = zero.reshape(-1).numpy()
        inputs.append("zero")
    size = {"K": features, "N": q.shape[0], "bits": q.format.bits, "block_size": q.format.group_size}
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", accuracy_level=4, **size)
    return torch.from_numpy(run([node], {"x": x.numpy()}, constants, "y")).double()


def distance(value, reference):
    return float((value - reference).norm() / reference.norm())


def padded_weight(features, fmt, seed):
    w = torch.randn(40, features, generator=torch.Generator().manual_seed(seed))
    return fmt.round_to_nearest(torch.nn.functional.pad(w, (0, -features % fmt.group_size)))


x86_only = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="other processors quantize the input per row"
)
blocks = pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
grids = pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (8, False)])


@x86_only
@blocks
@grids
@pytest.mark.parametrize("features", [256, 300])
def test_blockwise_fake_quantize_is_accuracy_level_4(bits, symmetric, block, features):
    q = padded_weight(features, IntegerFormat(bits, block, symmetric), block)
    w = q.dequantize()[:, :features].double()
    for rows in (1, 3, 64):
        x = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows))
        x[:, 7] *= 50
        x[0, : min(block, 64)] = 0
        y = matmul_nbits(x, q, features)
        assert distance(y, blockwise_fake_quantize(x, block).double() @ w.t()) < TOLERANCE
        assert distance(y, x.double() @ w.t()) > 1e-3  # it is not the float product


@x86_only
@blocks
@grids
@pytest.mark.parametrize("tail", [1, 9, 13])
def test_accuracy_level_4_breaks_ties_to_even_in_tails_too(bits, symmetric, block, tail):
    features = block + tail
    q = padded_weight(features, IntegerFormat(bits, block, symmetric), tail)
    w = q.dequantize()[:, :features].double()
    x = torch.randint(-126, 126, (4, features), generator=torch.Generator().manual_seed(tail)).float() + 0.5
    x[:, ::block] = 127  # the step is exactly 1, so every other value is a tie
    assert distance(matmul_nbits(x, q, features), blockwise_fake_quantize(x, block).double() @ w.t()) < TOLERANCE


@pytest.mark.by_default("*4-True", "*8-False")
@x86_only
@grids
def test_accuracy_level_4_multiplies_by_127_over_absmax(bits, symmetric):
    x = torch.randn(32768, 256, generator=torch.Generator().manual_seed(0))
    blocks = x.view(-1, 8, 32)
    absmax = blocks.abs().amax(-1, keepdim=True)
    step = absmax / 127
    codes = torch.round(blocks * (torch.full_like(absmax, 127) / absmax))
    # Rows in which another order of the same operations rounds some value to the neighbouring code.
    for other in (blocks / step, blocks * (1 / step), blocks * (127 * absmax.reciprocal()), blocks * 127 / absmax):
        rows = (torch.round(other) != codes).flatten(1).any(1)
        assert bool(rows.any())
        q = padded_weight(256, IntegerFormat(bits, 32, symmetric), seed=1)
        reference = blockwise_fake_quantize(x[rows], 32).double() @ q.dequantize().double().t()
        assert distance(matmul_nbits(x[rows], q, 256), reference) < TOLERANCE


@x86_only
def test_blocks_too_small_for_the_reciprocal_become_zero():
    x = torch.full((2, 64), 2e-37)
    x[:, 32:] = 1e-36
    q = IntegerFormat(8, 32).round_to_nearest(torch.ones(8, 64))
    reference = blockwise_fake_quantize(x, 32)
    assert not reference[:, :32].any() and torch.allclose(reference[:, 32:], x[:, 32:], rtol=1e-6, atol=0)
    # Products of 1e-38 are at the edge of float32's normal range, hence the loose bound.
    assert distance(matmul_nbits(x, q, 64) * 1e36, reference.double() @ q.dequantize().double().t() * 1e36) < 1e-4


def test_blockwise_fake_quantize_keeps_shape_and_dtype():
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).half()
    out = blockwise_fake_quantize(x, 32)
    assert out.shape == x.shape and out.dtype == torch.float16
    assert torch.equal(out.view(6, 50), blockwise_fake_quantize(x.view(6, 50), 32))
    assert not blockwise_fake_quantize(torch.zeros(1, 40), 16).any()


@grids
def test_dequantized_weights_are_those_of_dequantizelinear(bits, symmetric):
    q = padded_weight(64, IntegerFormat(bits, 16, symmetric), seed=0)
    # Widening 4-bit codes to bytes changes no value, and keeps the model free of packed types.
    constants = {"codes": q.codes.numpy(), "scale": q.scale.numpy()}
    if not symmetric:
        constants["zero"] = q.zero_point.numpy()
    node = helper.make_node("DequantizeLinear", list(constants), ["y"], axis=1, block_size=16)
    assert torch.equal(torch.from_numpy(run([node], {}, constants, "y")), q.dequantize())
