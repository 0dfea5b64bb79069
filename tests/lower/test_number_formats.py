"""Number formats in ONNX Runtime where one would guess wrong; `samples/number_formats.py` asks for all of them."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

from qexport.quant.formats.codebooks import FP4
from qexport.quant.small_floats import E2M1, e4m3_codes, e4m3_values

F32, U8, E4M3, E5M2 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2
E8M0, E2M1_TYPE = TensorProto.FLOAT8E8M0, TensorProto.FLOAT4E2M1


def run(nodes, tensors, outputs=("y",), opset=23, **feeds):
    """The outputs of a few nodes on the CPU."""
    inputs = [helper.make_tensor_value_info(name, F32, array.shape) for name, array in feeds.items()]
    ends = [helper.make_tensor_value_info(name, F32, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, ends, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    built = helper.make_model(graph, opset_imports=opsets, ir_version=13)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(built.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def tensor(name, dtype, shape, content):
    return TensorProto(name=name, data_type=dtype, dims=shape, raw_data=bytes(content))


def rounded(x, dtype, saturate):
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=dtype, saturate=saturate),
        helper.make_node("Cast", ["c"], ["y"], to=F32),
    ]
    return run(nodes, [], x=x)


def test_what_we_round_to_is_what_a_saturating_cast_gives():
    x = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    x = x[np.isfinite(x)]
    ours = e4m3_values(e4m3_codes(torch.from_numpy(x))).numpy()
    assert np.array_equal(rounded(x, E4M3, 1), ours)


def test_without_saturation_some_numbers_that_are_too_large_are_not_nan_and_others_are():
    """findings/float8_without_saturation.sh; nothing here casts so."""
    x = np.array([464, 465, 479, 480, 495, 496], np.float32)
    assert np.array_equal(rounded(x, E4M3, 0), np.float32([448, np.nan, np.nan, 448, 448, np.nan]), equal_nan=True)
    x = np.array([61439, 61440, 65535, 65536], np.float32)
    assert np.array_equal(rounded(x, E5M2, 0), np.float32([57344, np.nan, np.nan, np.inf]), equal_nan=True)


def test_libraries_differ_beyond_the_largest_e4m3_number():
    x = np.array([465, np.inf, np.nan], np.float32)
    theirs = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    torchs = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
    assert np.isnan(theirs).all() and torchs[:2].tolist() == [448, 448] and np.isnan(torchs[2])


def test_the_fp4_of_matmulbnb4_is_not_e2m1():
    """One of eight values differs, so that no MXFP4 or NVFP4 weight fits it."""
    fp4 = sorted(v for v in (FP4.table() * 12).tolist() if v >= 0)[1:]
    assert [(a, b) for a, b in zip(fp4, (2 * v for v in E2M1), strict=True) if abs(a - b) > 1e-6] == [(0.0625, 1.0)]


@pytest.mark.parametrize("operator", ["Cast", "DequantizeLinear"])
@pytest.mark.parametrize("opset", [23, 25])
def test_the_cpu_reads_no_e2m1_tensor_but_to_look_up_its_rows(operator, opset):
    read = ["c"] if operator == "Cast" else ["c", "s"]
    node = helper.make_node(operator, read, ["y"], **({"to": F32} if operator == "Cast" else {}))
    tensors = [tensor("c", E2M1_TYPE, [4], b"\x21\x43"), helper.make_tensor("s", F32, [], [1.0])][: len(read)]
    with pytest.raises(NotImplemented, match="Could not find an implementation"):
        run([node], tensors, opset=opset)
    rows = np.arange(256, dtype=np.uint8).repeat(8).tobytes()
    lookup = helper.make_node(
        "GatherBlockQuantized", ["c", "i", "s"], ["y"], domain="com.microsoft", block_size=16, quantize_axis=1
    )
    tensors = [
        tensor("c", E2M1_TYPE, [256, 16], rows), tensor("i", TensorProto.INT64, [256], np.arange(256).tobytes()),
        tensor("s", F32, [256, 1], np.ones(256, np.float32).tobytes()),
    ]  # fmt: skip
    values = np.array([*E2M1, *(-v for v in E2M1)], np.float32)
    bytes_ = np.arange(256)
    assert np.array_equal(run([lookup], tensors)[:, :2], np.stack([values[bytes_ & 15], values[bytes_ >> 4]], 1))


def test_powers_of_two_can_be_cast_from_opset_24_on_and_scale_nothing():
    """So that files of opset 23 look them up."""
    every = tensor("c", E8M0, [256], range(256))
    cast = helper.make_node("Cast", ["c"], ["y"], to=F32)
    wanted = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(run([cast], [every], opset=24), wanted, equal_nan=True)
    with pytest.raises(InvalidGraph, match="float8e8m0"):
        run([cast], [every], opset=23)
    numbers = tensor("n", E4M3, [256], range(256))
    with pytest.raises((InvalidGraph, NotImplemented, Fail)):
        run([helper.make_node("DequantizeLinear", ["n", "c"], ["y"], block_size=1)], [numbers, every], opset=25)


def matmul_nbits(x, bits, block, level=1):
    """Of codes that count up, with scales of one."""
    k, n = x.shape[1], 4
    codes = (np.arange(n * k) % (1 << bits)).reshape(n, k)
    packed = np.packbits((codes[..., None] >> np.arange(bits) & 1).reshape(n, -1).astype(np.uint8), -1, "little")
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block,
        accuracy_level=level,
    )  # fmt: skip
    shape = [n, k // block, block * bits // 8]
    ones = helper.make_tensor("s", F32, [n, k // block], [1.0] * (n * k // block))
    tensors = [tensor("w", U8, shape, packed.tobytes()), ones]
    return run([node], tensors, x=x), x @ (codes - (1 << bits - 1)).T


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bits_that_the_schema_names_and_no_kernel_has(bits):
    """Its text says that bits can be 2 to 8: 2, 4 and 8 are what there is."""
    with pytest.raises(Fail, match="Only 2b, 4b and 8b"):
        matmul_nbits(np.ones((1, 128), np.float32), bits, 32)


@pytest.mark.parametrize("bits, block, rounds", [
    (2, 16, False), (2, 32, True), (2, 128, True), (2, 256, False), (4, 16, True), (4, 256, True), (8, 256, True),
])  # fmt: skip
def test_accuracy_level_4_rounds_no_inputs_of_some_2_bit_weights(bits, block, rounds):
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    got, wanted = matmul_nbits(x, bits, block, level=4)
    assert (np.abs(got - wanted).max() > 1e-5 * np.abs(wanted).max()) == rounds


@pytest.mark.parametrize("kind", ["fp8", "wfp4afp8"])
def test_qmoe_of_8_bit_floats_is_in_the_schema_and_not_in_the_package(cuda_placement, tmp_path, kind):
    from helpers.cuda_placement.models import model, value
    from helpers.cuda_placement.probe import PlacementError

    numbers, scale, per_byte = (E4M3, F32, 1) if kind == "fp8" else (U8, E8M0, 2)
    shapes = {"w1": (2, 256, 128 // per_byte), "w2": (2, 128, 128 // per_byte)}
    tensors = [tensor(name, numbers, shape, bytes(int(np.prod(shape)))) for name, shape in shapes.items()]
    for name, rows in (("s1", 256), ("s2", 128)):
        shape = (2, rows // 128, 1) if kind == "fp8" else (2, rows, 4)
        tensors.append(tensor(name, scale, shape, bytes(int(np.prod(shape)) * (4 if kind == "fp8" else 1))))
    node = helper.make_node(
        "QMoE", ["x", "r", "w1", "s1", "", "w2", "s2"], ["y"], domain="com.microsoft", k=1, quant_type=kind,
        activation_type="swiglu", swiglu_fusion=1, block_size=128 if kind == "fp8" else 32,
        expert_weight_bits=8 // per_byte,
    )  # fmt: skip
    ends = [value(name, TensorProto.FLOAT16, "n", size) for name, size in (("x", 128), ("r", 2), ("y", 128))]
    onnx.save(model([node], ends[:2], ends[2:], tensors), tmp_path / "model.onnx")
    with pytest.raises(PlacementError, match="requires USE_FP8_QMOE"):
        cuda_placement(tmp_path / "model.onnx", {})
