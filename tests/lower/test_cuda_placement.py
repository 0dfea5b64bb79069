"""The linears that are lowered to for CUDA really run there: no node on the CPU, no copy, the fusion that was meant.

ONNX Runtime on stand-in CUDA libraries: placement only, nothing is computed.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node

from helpers.cuda_placement.build import CannotBuild, build_stand_ins
from helpers.cuda_placement.models import ALL_ON_CUDA, CPU, DIMS, assert_all_on_cuda, int4, model, tensor, value
from helpers.cuda_placement.probe import PlacementError

F16, F32 = TensorProto.FLOAT16, TensorProto.FLOAT
K, N = 256, 128
# What keeps a bias apart from its MatMulNBits, and the kernel for which that is done.
APART = {
    "optimization.disable_specified_optimizers": "MatMulAddFusion;MatMulNBitsFusion",
    "ep.cuda.fpa_intb_gemm": "1",
}


@pytest.fixture
def place(cuda_placement, tmp_path):
    def place_model(built, entries=None):
        onnx.save(built, tmp_path / "model.onnx")
        return cuda_placement(tmp_path / "model.onnx", entries or {}, dims=DIMS)

    return place_model


X, Y = value("x", F16, "batch_size", "sequence_length", K), value("y", F16, "batch_size", "sequence_length", N)
BIAS = tensor("bias", np.ones(N), np.float16)
ADD_BIAS = make_node("Add", ["product", "bias"], ["y"])

# ---- linears --------------------------------------------------------------------------------------------------------


def weight_only(weight, *lengths):
    x, y = (value(name, F16, *lengths, width) for name, width in (("x", K), ("y", N)))
    nodes = [
        make_node("DequantizeLinear", ["w", "scale"], ["wide"], axis=0, block_size=32),
        make_node("MatMul", ["x", "wide"], ["product"]),
        ADD_BIAS,
    ]
    return model(nodes, [x], [y], [weight, tensor("scale", np.ones((K // 32, N)), np.float16), BIAS])


INT4, INT8 = int4("w", K, N), tensor("w", np.ones((K, N)), np.int8)


@pytest.mark.parametrize("lengths", [("batch_size", "sequence_length"), (2, 3), ("batch_size",)], ids=str)
@pytest.mark.parametrize("weight", [INT4, INT8], ids=["int4", "int8"])
def test_weight_only_linear_becomes_matmulnbits_with_its_bias_apart(place, weight, lengths):
    placed = place(weight_only(weight, *lengths), APART)
    assert_all_on_cuda(placed, {"MatMulNBits": 1, "Add": 1})
    assert placed["producers"]["product"] == "MatMulNBits"


# Known lengths or two dimensions let MatMulAddFusion take the bias, symbolic lengths leave it to MatMulNBitsFusion.
@pytest.mark.parametrize(
    "left_on, lengths",
    [
        ("MatMulAddFusion", ("batch_size",)), ("MatMulAddFusion", (2, 3)),
        ("MatMulNBitsFusion", ("batch_size", "sequence_length")),
    ],  # fmt: skip
)
def test_either_fusion_alone_folds_the_bias_in(place, left_on, lengths):
    (off,) = {"MatMulAddFusion", "MatMulNBitsFusion"} - {left_on}
    entries = {"optimization.disable_specified_optimizers": off}
    assert "Add" not in place(weight_only(INT4, *lengths), entries)["optimized_ops"]


def test_bias_is_folded_into_matmulnbits_by_default(place):
    assert_all_on_cuda(place(weight_only(INT4, "batch_size", "sequence_length")), {"MatMulNBits": 1})


INTEGER_GEMM = [
    make_node("MatMulInteger", ["q", "w8"], ["sum"]),
    make_node("Cast", ["sum"], ["wide_sum"], to=F32),
]
INTEGER_INITIALIZERS = [
    tensor("zero", 0, np.int8),
    tensor("w_scale", np.ones(N), np.float32),
    BIAS,
]
INTEGER_WEIGHT = tensor("w8", np.ones((K, N)), np.int8)


def static_int8(*before):
    nodes = [
        *before,
        make_node("QuantizeLinear", ["x", "a_scale", "zero"], ["q"]),
        *INTEGER_GEMM,
        make_node("Mul", ["wide_sum", "w_scale"], ["scaled"]),
        make_node("Cast", ["scaled"], ["product"], to=F16),
        ADD_BIAS,
    ]
    weight = int4("w", K, N) if before else INTEGER_WEIGHT
    return model(nodes, [X], [Y], [weight, tensor("a_scale", 0.01, np.float16), *INTEGER_INITIALIZERS])


STATIC_OPS = {"QuantizeLinear": 1, "MatMulInteger": 1, "Cast": 2, "Mul": 1, "Add": 1}


@pytest.mark.parametrize("entries", [{}, APART], ids=["default", "apart"])
def test_static_int8_chain_runs_on_cuda(place, entries):
    assert_all_on_cuda(place(static_int8(), entries), STATIC_OPS)


def test_int4_weights_of_the_integer_chain_are_widened_once_at_load(place):
    widen = make_node("Cast", ["w"], ["w8"], to=TensorProto.INT8)
    assert_all_on_cuda(place(static_int8(widen)), STATIC_OPS)


def per_token_int8():
    nodes = [
        make_node("Abs", ["x"], ["magnitude"]),
        make_node("ReduceMax", ["magnitude", "last"], ["absmax"], keepdims=1),
        make_node("Mul", ["absmax", "step"], ["raw_scale"]),
        make_node("Max", ["raw_scale", "tiny"], ["a_scale"]),
        make_node("Div", ["x", "a_scale"], ["steps"]),
        make_node("QuantizeLinear", ["steps", "one", "zero"], ["q"]),
        *INTEGER_GEMM,
        make_node("Cast", ["a_scale"], ["wide_a_scale"], to=F32),
        make_node("Mul", ["wide_sum", "wide_a_scale"], ["rows_scaled"]),
        make_node("Mul", ["rows_scaled", "w_scale"], ["scaled"]),
        make_node("Cast", ["scaled"], ["product"], to=F16),
        ADD_BIAS,
    ]
    constants = [tensor("last", [-1], np.int64), tensor("step", 1 / 127, np.float16), tensor("tiny", 1e-6, np.float16)]
    return model(nodes, [X], [Y], [INTEGER_WEIGHT, *constants, tensor("one", 1, np.float16), *INTEGER_INITIALIZERS])


def test_per_token_int8_chain_runs_on_cuda(place):
    ops = {"Abs": 1, "ReduceMax": 1, "Mul": 3, "Max": 1, "Div": 1, "QuantizeLinear": 1, "MatMulInteger": 1, "Cast": 3}
    assert_all_on_cuda(place(per_token_int8()), {**ops, "Add": 1})


# ---- what the CUDA provider does not take: these prove that the tests above can fail ---------------------------------


def dynamic_quantize():
    nodes = [
        make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        make_node("MatMulInteger", ["q", "w8", "zero"], ["sum"]),
        make_node("Cast", ["sum"], ["wide_sum"], to=F32),
        make_node("Mul", ["wide_sum", "scale"], ["y"]),
    ]
    x, y = value("x", F32, "batch_size", "sequence_length", K), value("y", F32, "batch_size", "sequence_length", N)
    return model(nodes, [x], [y], [INTEGER_WEIGHT])


def test_dynamic_quantize_linear_falls_to_the_cpu(place):
    placed = place(dynamic_quantize())
    assert placed["nodes"][CPU] == {"DynamicQuantizeLinear": 1, "MatMulInteger": 1}
    assert placed["memcpy"] == 2
    with pytest.raises(PlacementError, match="fallback to CPU EP has been explicitly disabled"):
        place(dynamic_quantize(), ALL_ON_CUDA)


def test_uint8_activations_of_an_integer_gemm_fall_to_the_cpu(place):
    nodes = [
        make_node("QuantizeLinear", ["x", "a_scale", "zero"], ["q"]),
        make_node("MatMulInteger", ["q", "w8", "zero"], ["sum"]),
        make_node("Cast", ["sum"], ["y"], to=F16),
    ]
    constants = [INTEGER_WEIGHT, tensor("a_scale", 0.01, np.float16), tensor("zero", 128, np.uint8)]
    placed = place(model(nodes, [X], [Y], constants))
    assert placed["nodes"][CPU] == {"MatMulInteger": 1}
    assert placed["memcpy"] == 2


def test_libraries_that_do_not_load_are_an_error_not_a_run_on_the_cpu(cuda_placement, tmp_path):
    onnx.save(dynamic_quantize(), tmp_path / "model.onnx")
    (tmp_path / "libcublasLt.so.13").write_bytes(b"")
    with pytest.raises(PlacementError, match="libcublasLt"):
        cuda_placement(tmp_path / "model.onnx", {}, env={"LD_LIBRARY_PATH": str(tmp_path)})


def test_a_machine_that_cannot_build_the_stand_ins_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(CannotBuild, match="Linux"):
        build_stand_ins(tmp_path)
