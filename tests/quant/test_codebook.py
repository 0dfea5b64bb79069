"""NF4 and FP4: the tables of ONNX Runtime, the nearest of their values, and scales rounded as bitsandbytes does."""

import numpy
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qexport.errors import NumericsError, RecipeError
from qexport.quant.formats import Scheme
from qexport.quant.formats.codebooks import CODEBOOKS, FP4, NF4, decode_codebook, double_quantized, dynamic_map
from qexport.quant.packing import pack_high_first

books = pytest.mark.parametrize("book", ["nf4", "fp4"])


def fmt(name):
    return Scheme.parse(name).weight


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_onnxruntime(x, codes, scale, book, block_size):
    """x [M, K] times the weight, by MatMulBnb4."""
    n, k = codes.shape
    size = {"K": k, "N": n, "block_size": block_size, "quant_type": {"fp4": 0, "nf4": 1}[book]}
    constants = {"codes": pack_high_first(codes).numpy(), "absmax": scale.reshape(-1).numpy()}
    graph = helper.make_graph(
        [helper.make_node("MatMulBnb4", ["x", *constants], ["y"], domain="com.microsoft", **size)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@books
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_the_weight_is_that_of_onnxruntime_bit_by_bit(book, block_size):
    codes = torch.randint(0, 16, (20, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[0, :16] = torch.arange(16)
    scale = normal(20, 1024 // block_size, seed=1).abs() + 0.1
    weight = decode_codebook(codes, scale, book, block_size)
    assert torch.equal(in_onnxruntime(torch.eye(1024), codes, scale, book, block_size).t(), weight)


@books
def test_inputs_of_the_kernel_stay_float(book):
    q = fmt(book).round_to_nearest(normal(40, 512))
    x = normal(5, 512, seed=2)
    x[:, 7] *= 50
    exact = x.double() @ q.dequantize().double().t()
    error = in_onnxruntime(x, q.codes, q.scale, book, 64) - exact
    assert error.norm() < 1e-6 * exact.norm()


def test_tables_are_the_published_ones():
    nf4, fp4 = NF4.table(), FP4.table()
    assert nf4.tolist() == sorted(nf4.tolist()) and nf4[[0, 7, 15]].tolist() == [-1, 0, 1]
    assert nf4[8].item() == numpy.float32(0.07958029955625534)
    assert torch.equal(fp4[8:], -fp4[:8]) and fp4[3] == 1
    assert torch.allclose(fp4[:8] * 12, torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]))


@books
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([16, 64, 512]), st.floats(1e-30, 1e30))
def test_codes_are_the_nearest_values(book, seed, block_size, size):
    w = normal(3, 1024, seed=seed) * size
    w[1] = torch.round(w[1] / size) * size  # many equal values, zeros among them
    q = CODEBOOKS[book](block_size).round_to_nearest(w)
    absmax = w.view(3, -1, block_size).abs().amax(-1)
    assert torch.equal(q.scale, absmax) and q.zero_point is None and q.codes.dtype == torch.uint8
    values = CODEBOOKS[book].table().double()
    scaled = w.double().view(3, -1, block_size) / absmax.double()[..., None]
    distance = (scaled.view(3, 1024, 1) - values).abs()
    chosen = distance.gather(-1, q.codes.long()[..., None])[..., 0]
    # The division in float32 can cross the middle between two values by its own rounding, not by more.
    assert bool((chosen <= distance.amin(-1) + 2**-23).all())
    assert torch.equal(q.dequantize(), values[q.codes.long()].float() * absmax.repeat_interleave(block_size, 1))


@books
def test_ties_go_to_the_lower_value_and_in_fp4_towards_zero(book):
    values = CODEBOOKS[book].table().double()
    ordered = torch.unique(values)
    for low, high in zip(ordered[:-1], ordered[1:], strict=True):
        middle = float((low + high) / 2)
        below = numpy.nextafter(numpy.float32(middle), numpy.float32(-2))
        above = numpy.nextafter(numpy.float32(middle), numpy.float32(2))
        w = torch.zeros(1, 16)
        w[0, :4] = torch.tensor([1, below, above, middle])
        q = CODEBOOKS[book](16).round_to_nearest(w)
        exact = w[0, 3].double().item()
        lower = exact < middle or exact == middle and (book == "nf4" or middle > 0)
        expected = [1, low, high, low if lower else high]
        assert values[q.codes[0, :4].long()].tolist() == pytest.approx([float(v) for v in expected], abs=0)


@books
def test_blocks_of_zeros_and_of_subnormals(book):
    w = normal(2, 128)
    w[0, :64], w[1, 64:] = 0, 1e-39
    for name in (book, f"{book}_dq"):
        q = fmt(name).round_to_nearest(w)
        assert q.scale[0, 0] == q.scale[1, 1] == 1 and bool((q.scale > 0).all())
        assert not q.dequantize()[0, :64].any() and not q.dequantize()[1, 64:].any()
        assert q.dequantize()[0, 64:].abs().amax() > 0.5
    zero = fmt(f"{book}_dq").round_to_nearest(torch.zeros(3, 64))
    assert not zero.dequantize().any() and bool((zero.scale == 1).all())


@books
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(book, bad):
    w = normal(4, 64)
    w[2, 5] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        fmt(book).round_to_nearest(w)
    with pytest.raises(RecipeError, match="groups of 64"):
        fmt(book).round_to_nearest(normal(4, 96))


@books
def test_the_weight_is_left_as_it_was_and_may_be_of_any_type_and_layout(book):
    w = normal(64, 700 * 64)  # more than what is worked on at once
    kept, transposed = w.clone(), w.t().contiguous().t()
    q = fmt(book).round_to_nearest(w)
    assert torch.equal(w, kept)
    assert torch.equal(fmt(book).round_to_nearest(transposed).codes, q.codes)
    assert torch.equal(fmt(book).round_to_nearest(w[:1].double()).codes, q.codes[:1])
    half = decode_codebook(q.codes[:2], q.scale[:2].half(), book, 64)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), q.dequantize()[:2], rtol=2e-3, atol=1e-3)


def test_the_dynamic_map_is_made_of_decades():
    """By the description of arXiv 2110.02861: 2^i values of each sign in decade i, 0 and 1."""
    expected = [0.0, 1.0]
    for i in range(7):
        for part in range(2**i):
            middle = (0.1 + 0.9 * part / 2**i + 0.1 + 0.9 * (part + 1) / 2**i) / 2
            expected += [middle * 10 ** (i - 6), -middle * 10 ** (i - 6)]
    values = dynamic_map()
    assert values.shape == (256,) and values.dtype == torch.float32
    assert torch.allclose(values.double(), torch.tensor(sorted(expected), dtype=torch.float64), rtol=3e-7, atol=0)


def slowly_double_quantized(absmax):
    values = dynamic_map().double().tolist()
    flat = absmax.double().reshape(-1)
    mean, result = float(flat.mean()), []
    for start in range(0, len(flat), 256):
        run = flat[start : start + 256] - mean
        step = float(run.abs().max()) or 1.0
        result += [min(values, key=lambda v, c=float(c): abs(v - c / step)) * step + mean for c in run]
    return torch.tensor(result, dtype=torch.float64).view(absmax.shape)


@pytest.mark.parametrize("shape", [(7, 3), (64, 4), (30, 50)])
def test_double_quantization_agrees_with_a_slow_loop(shape):
    absmax = normal(*shape, seed=3).abs() * 0.02 + 0.05
    absmax[0, 0] = 0.5
    fast, slow = double_quantized(absmax), slowly_double_quantized(absmax)
    assert torch.allclose(fast.double(), slow, rtol=1e-5, atol=0)
    assert 0 < (fast - absmax).abs().max() < 0.02 * absmax.max()


def test_double_quantization_changes_scales_and_no_codes():
    w = normal(64, 256)
    plain, double = fmt("nf4").round_to_nearest(w), fmt("nf4_dq").round_to_nearest(w)
    assert torch.equal(plain.codes, double.codes)
    assert torch.equal(double.scale, double_quantized(plain.scale)) and not torch.equal(double.scale, plain.scale)
    errors = [float((q.dequantize() - w).norm()) for q in (plain, double)]
    assert errors[0] < errors[1] * 1.001 and errors[1] < 1.1 * errors[0]


def test_scales_that_come_back_are_positive():
    absmax = torch.full((1, 256), 0.01)
    absmax[0, 0], absmax[0, 1] = 10, 1e-6
    assert bool((double_quantized(absmax) > 0).all())
