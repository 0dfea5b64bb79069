"""The quantization operators against ONNX Runtime's and against slow loops."""

import numpy
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import qexport.graph.ops  # noqa: F401  registers the operators

ops = torch.ops.qexport


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_per_token_codes_agree_with_a_loop(seed, features):
    x = normal(2, 3, features, seed=seed)
    x[0, 1] = 0
    scale = ops.token_scale(x, 127)
    codes = ops.quantize_linear(x / scale, torch.ones(()), 0, True)
    assert scale.shape == (2, 3, 1) and codes.dtype == torch.int8 and float(scale[0, 1, 0]) == pytest.approx(1e-8)
    for row, step, row_codes in zip(x.view(6, -1), scale.view(6), codes.view(6, -1), strict=True):
        # Times the reciprocal of 127, as the file has it: one more rounding than a division.
        assert float(step) == pytest.approx(max(max(abs(float(v)) for v in row) / 127, 1e-8), rel=2**-22)
        for value, code in zip(row, row_codes, strict=True):
            assert abs(float(value) / float(step) - int(code)) < 0.50001


def test_the_smallest_token_scale_fits_the_dtype():
    assert float(ops.token_scale(torch.zeros(1, 4), 127)) == pytest.approx(1e-8)
    assert float(ops.token_scale(torch.zeros(1, 4).half(), 127)) == pytest.approx(1e-6, rel=0.05)  # a subnormal number


@pytest.mark.parametrize(("zero_point", "signed"), [(0, True), (128, False)])
@pytest.mark.parametrize("scale", [0.03, 0.0231, 0.25])
def test_codes_are_those_of_quantizelinear(zero_point, signed, scale):
    x = normal(64, 1000)
    x[0] = (torch.arange(1000) - 500) / 8  # ties, and values far outside
    kind, dtype = (TensorProto.INT8, numpy.int8) if signed else (TensorProto.UINT8, numpy.uint8)
    constants = {"scale": numpy.array(scale, numpy.float32), "zero": numpy.array(zero_point, dtype)}
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 1000])],
        [helper.make_tensor_value_info("y", kind, [64, 1000])],
        [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(v.dtype), [], [v.item()]) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (want,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x.numpy()}
    )
    assert numpy.array_equal(want, ops.quantize_linear(x, torch.tensor(scale), zero_point, signed).numpy())


def test_integer_products_are_exact():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (3, 5, 700), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (700, 9), dtype=torch.int8, generator=generator)
    assert torch.equal(ops.matmul_integer(a, b).long(), a.long() @ b.long())
