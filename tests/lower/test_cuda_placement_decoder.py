"""The rest of a decoder on CUDA: masks, attention, rotary embedding, norms, activations, embedding, shapes.

ONNX Runtime on stand-in CUDA libraries: placement, and whether a kernel takes its inputs; nothing is computed.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.helper import make_node

from helpers.cuda_placement.models import ALL_ON_CUDA, CPU, CUDA, DIMS, assert_all_on_cuda, int4, model, tensor, value
from helpers.cuda_placement.probe import PlacementError

F16, F32, I64, BOOL = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
HEADS, KV_HEADS, HEAD = 4, 2, 64
WIDTH, KV_WIDTH = HEADS * HEAD, KV_HEADS * HEAD
X, Y = (value(name, F16, "batch_size", "sequence_length", WIDTH) for name in "xy")
ATTENTION_MASK = value("attention_mask", I64, "batch_size", "total_sequence_length")
POSITION_IDS = value("position_ids", I64, "batch_size", "sequence_length")
GAIN = tensor("gain", np.ones(WIDTH), np.float16)


@pytest.fixture
def place(cuda_placement, tmp_path):
    def place_model(built, entries=None):
        onnx.save(built, tmp_path / "model.onnx")
        return cuda_placement(tmp_path / "model.onnx", entries or {}, dims=DIMS)

    return place_model


# ---- masks ----------------------------------------------------------------------------------------------------------

# A key's position is how many real tokens stand up to it, less one: the positions that position_ids counts. So a query
# sees the real keys up to its own position, no length is computed on the CPU, and padding on the left sees the first
# real token, so that no row of the mask is empty.
MASK = [
    make_node("CumSum", ["attention_mask", "one"], ["seen"]),
    make_node("Sub", ["seen", "one"], ["key_position"]),
    make_node("Unsqueeze", ["key_position", "axes_1_2"], ["keys"]),
    make_node("Unsqueeze", ["position_ids", "axes_1_3"], ["queries"]),
    make_node("LessOrEqual", ["keys", "queries"], ["not_later"]),
    make_node("Cast", ["attention_mask"], ["is_real"], to=BOOL),
    make_node("Unsqueeze", ["is_real", "axes_1_2"], ["real"]),
    make_node("And", ["not_later", "real"], ["mask"]),
]
MASK_OPS = {"CumSum": 1, "Sub": 1, "Unsqueeze": 3, "LessOrEqual": 1, "Cast": 1, "And": 1}
MASK_CONSTANTS = [
    tensor("one", 1, np.int64),
    tensor("axes_1_2", [1, 2], np.int64),
    tensor("axes_1_3", [1, 3], np.int64),
]
ADDITIVE = make_node("Where", ["mask", "nothing", "lowest"], ["bias"])
ADDITIVE_CONSTANTS = [tensor("nothing", 0, np.float16), tensor("lowest", -65504, np.float16)]
BOOL_MASK = value("mask", BOOL, "batch_size", 1, "sequence_length", "total_sequence_length")
FLOAT_MASK = value("bias", F16, "batch_size", 1, "sequence_length", "total_sequence_length")


def mask_from_positions(additive=False):
    nodes, constants = (MASK + [ADDITIVE], MASK_CONSTANTS + ADDITIVE_CONSTANTS) if additive else (MASK, MASK_CONSTANTS)
    return model(nodes, [ATTENTION_MASK, POSITION_IDS], [FLOAT_MASK if additive else BOOL_MASK], constants)


@pytest.mark.parametrize("additive", [False, True])
def test_mask_from_positions_needs_no_node_on_the_cpu(place, additive):
    ops = {**MASK_OPS, "Where": 1} if additive else MASK_OPS
    assert_all_on_cuda(place(mask_from_positions(additive), ALL_ON_CUDA), ops)


@pytest.mark.parametrize("past", [0, 2])
def test_mask_from_positions_is_the_causal_mask_without_padding(past):
    attention_mask = np.array([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = np.maximum(attention_mask.cumsum(1) - 1, 0)
    session = onnxruntime.InferenceSession(mask_from_positions().SerializeToString(), providers=[CPU])
    (mask,) = session.run(None, {"attention_mask": attention_mask, "position_ids": positions[:, past:]})
    total = attention_mask.shape[1]
    causal = np.tril(np.ones((total, total), bool)) & attention_mask.astype(bool)[:, None, :]
    real = attention_mask.astype(bool)[:, past:]
    assert (mask[:, 0][real] == causal[:, past:][real]).all()
    assert mask.any(-1).all()


def mask_from_lengths():
    nodes = [
        make_node("Shape", ["attention_mask"], ["total_sequence_length"], start=1, end=2),
        make_node("Shape", ["position_ids"], ["sequence_length"], start=1, end=2),
        make_node("Sub", ["total_sequence_length", "sequence_length"], ["past_sequence_length"]),
        make_node("Squeeze", ["total_sequence_length"], ["stop"]),
        make_node("Squeeze", ["past_sequence_length"], ["start"]),
        make_node("Range", ["zero", "stop", "one"], ["keys"]),
        make_node("Range", ["start", "stop", "one"], ["rows"]),
        make_node("Unsqueeze", ["rows", "one_axis"], ["queries"]),
        make_node("LessOrEqual", ["keys", "queries"], ["not_later"]),
        *MASK[5:],
    ]
    constants = [*MASK_CONSTANTS, tensor("zero", 0, np.int64), tensor("one_axis", [1], np.int64)]
    return model(nodes, [ATTENTION_MASK, POSITION_IDS], [BOOL_MASK], constants)


def test_mask_from_lengths_computes_them_on_the_cpu_without_a_copy(place):
    placed = place(mask_from_lengths())
    assert placed["nodes"][CPU] == {"Sub": 1, "Squeeze": 2}
    assert placed["memcpy"] == 0
    with pytest.raises(PlacementError, match="fallback to CPU EP has been explicitly disabled"):
        place(mask_from_lengths(), ALL_ON_CUDA)


def test_comparing_with_a_length_pulls_the_comparison_to_the_cpu_and_copies_its_result(place):
    nodes = [
        make_node("Shape", ["x"], ["length"], start=1, end=2),
        make_node("Less", ["position_ids", "length"], ["inside"]),
        make_node("Where", ["inside", "nothing", "lowest"], ["y"]),
    ]
    y = value("y", F16, "batch_size", "sequence_length")
    placed = place(model(nodes, [X, POSITION_IDS], [y], ADDITIVE_CONSTANTS))
    assert placed["nodes"][CPU] == {"Less": 1}
    assert placed["memcpy"] == 1


# ---- shapes ---------------------------------------------------------------------------------------------------------

HEADS_APART = value("y", F16, "batch_size", "sequence_length", HEADS, HEAD)


def test_reshape_by_zeros_needs_no_node_on_the_cpu(place):
    shape = tensor("shape", [0, 0, HEADS, HEAD], np.int64)
    built = model([make_node("Reshape", ["x", "shape"], ["y"])], [X], [HEADS_APART], [shape])
    assert_all_on_cuda(place(built, ALL_ON_CUDA), {"Reshape": 1})


def test_reshape_by_a_computed_shape_concatenates_on_the_cpu_without_a_copy(place):
    nodes = [
        make_node("Shape", ["x"], ["lengths"], start=0, end=2),
        make_node("Concat", ["lengths", "tail"], ["shape"], axis=0),
        make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    placed = place(model(nodes, [X], [HEADS_APART], [tensor("tail", [HEADS, HEAD], np.int64)]))
    assert placed["nodes"] == {CPU: {"Concat": 1}, CUDA: {"Shape": 1, "Reshape": 1}}


# ---- attention ------------------------------------------------------------------------------------------------------


def past_and_present():
    past = [value(f"past_{name}", F16, "batch_size", KV_HEADS, "past_sequence_length", HEAD) for name in "kv"]
    return past, [value(f"present_{name}", F16, "batch_size", KV_HEADS, "total_sequence_length", HEAD) for name in "kv"]


def attention(mask, rank=4, opset=23):
    """Grouped heads and a past; `mask` is the input it is given, None for the op's own causal mask."""
    heads, counts = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "y": HEADS}, {}
    if rank == 4:
        q, k, v, y = (value(name, F16, "batch_size", number, "sequence_length", HEAD) for name, number in heads.items())
    else:
        rows = "batch_size", "sequence_length"
        q, k, v, y = (value(name, F16, *rows, number * HEAD) for name, number in heads.items())
        counts = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
    past, present = past_and_present()
    names = ["q", "k", "v", mask.name if mask else "", "past_k", "past_v"]
    node = make_node("Attention", names, ["y", "present_k", "present_v"], is_causal=int(mask is None), **counts)
    return model([node], [q, k, v, *([mask] if mask else []), *past], [y, *present], opset=opset)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("mask", [FLOAT_MASK, BOOL_MASK, None], ids=["float", "bool", "causal"])
def test_attention_with_grouped_heads_and_past_runs_on_cuda(place, mask, rank):
    assert_all_on_cuda(place(attention(mask, rank), ALL_ON_CUDA), {"Attention": 1})


def test_attention_of_opset_24_runs_on_cuda(place):
    assert_all_on_cuda(place(attention(BOOL_MASK, opset=24), ALL_ON_CUDA), {"Attention": 1})


def test_attention_refuses_a_mask_without_a_row_for_each_query(place):
    with pytest.raises(PlacementError, match="inconsistent q_sequence_length"):
        place(attention(value("mask", BOOL, "batch_size", 1, 1, "total_sequence_length")))


def test_attention_with_a_float32_mask_beside_float16_is_taken_apart(place):
    placed = place(attention(value("mask", F32, "batch_size", 1, "sequence_length", "total_sequence_length")))
    assert "Attention" not in placed["optimized_ops"]
    assert CPU in placed["nodes"]


def test_grouped_query_attention_refuses_a_batch_of_prompts_after_a_past(place):
    past, present = past_and_present()
    names = ["x", "k", "v", "past_k", "past_v", "lengths", "longest"]
    node = make_node("GroupQueryAttention", names, ["y", "present_k", "present_v"], domain="com.microsoft",
                     num_heads=HEADS, kv_num_heads=KV_HEADS)  # fmt: skip
    k, v = (value(name, F16, "batch_size", "sequence_length", KV_WIDTH) for name in "kv")
    lengths = value("lengths", TensorProto.INT32, "batch_size")
    built = model([node], [X, k, v, *past, lengths], [Y, *present], [tensor("longest", 8, np.int32)])
    with pytest.raises(PlacementError, match="batch_size must be 1"):
        place(built)


# ---- rotary embedding -----------------------------------------------------------------------------------------------

QUERIES, ROTATED = (value(name, F16, "batch_size", HEADS, "sequence_length", HEAD) for name in "xy")
# Angles in float32: positions in the thousands are not whole numbers in float16.
ANGLES = [
    make_node("Cast", ["position_ids"], ["position"], to=F32),
    make_node("Unsqueeze", ["position", "axis_2"], ["column"]),
    make_node("Mul", ["column", "frequencies"], ["angle"]),
    make_node("Cos", ["angle"], ["wide_cos"]),
    make_node("Sin", ["angle"], ["wide_sin"]),
    make_node("Cast", ["wide_cos"], ["cos"], to=F16),
    make_node("Cast", ["wide_sin"], ["sin"], to=F16),
]
ANGLE_OPS = {"Cast": 3, "Unsqueeze": 1, "Mul": 1, "Cos": 1, "Sin": 1}
ANGLE_CONSTANTS = [tensor("axis_2", [2], np.int64), tensor("frequencies", np.ones((1, 1, HEAD // 2)), np.float32)]
TABLES = [tensor(name, np.ones((16, HEAD // 2)), np.float16) for name in ("cos", "sin")]


@pytest.mark.parametrize("rank", [3, 4])
def test_rotary_embedding_by_table_and_positions_runs_on_cuda(place, rank):
    heads = {"num_heads": HEADS} if rank == 3 else {}
    node = make_node("RotaryEmbedding", ["x", "cos", "sin", "position_ids"], ["y"], **heads)
    x, y = (X, Y) if rank == 3 else (QUERIES, ROTATED)
    assert_all_on_cuda(place(model([node], [x, POSITION_IDS], [y], TABLES), ALL_ON_CUDA), {"RotaryEmbedding": 1})


def test_rotary_embedding_by_computed_angles_runs_on_cuda(place):
    nodes = [*ANGLES, make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"])]
    built = model(nodes, [QUERIES, POSITION_IDS], [ROTATED], ANGLE_CONSTANTS)
    assert_all_on_cuda(place(built, ALL_ON_CUDA), {**ANGLE_OPS, "RotaryEmbedding": 1})


def test_rotary_embedding_refuses_angles_of_one_row_for_a_batch(place):
    angles = [value(name, F16, 1, "sequence_length", HEAD // 2) for name in ("cos", "sin")]
    with pytest.raises(PlacementError, match="cos_cache"):
        place(model([make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"])], [QUERIES, *angles], [ROTATED]))


# ---- norms, activations, embedding ----------------------------------------------------------------------------------

OTHER, SHIFT = value("other", F16, "batch_size", "sequence_length", WIDTH), tensor("shift", np.zeros(WIDTH), np.float16)
SIGMOID = make_node("Sigmoid", ["x"], ["gate"])
ADD = make_node("Add", ["x", "other"], ["sum"])
SKIP = make_node("SkipSimplifiedLayerNormalization", ["x", "other", "gain"], ["y"], domain="com.microsoft")
PIECES = {
    "RMSNormalization": ([make_node("RMSNormalization", ["x", "gain"], ["y"])], {"RMSNormalization": 1}),
    "Add, RMSNormalization": (
        [ADD, make_node("RMSNormalization", ["sum", "gain"], ["y"])], {"Add": 1, "RMSNormalization": 1}),
    "SkipSimplifiedLayerNormalization": ([SKIP], {"SkipSimplifiedLayerNormalization": 1}),
    "LayerNormalization": (
        [make_node("LayerNormalization", ["x", "gain", "shift"], ["y"])], {"LayerNormalization": 1}),
    "Add, LayerNormalization": (
        [ADD, make_node("LayerNormalization", ["sum", "gain", "shift"], ["y"])], {"SkipLayerNormalization": 1}),
    "Gelu": ([make_node("Gelu", ["x"], ["y"])], {"Gelu": 1}),
    "Gelu by tanh": ([make_node("Gelu", ["x"], ["y"], approximate="tanh")], {"Gelu": 1}),
    "SiLU": ([SIGMOID, make_node("Mul", ["x", "gate"], ["y"])], {"QuickGelu": 1}),
    "SwiGLU": (
        [SIGMOID, make_node("Mul", ["x", "gate"], ["silu"]), make_node("Mul", ["silu", "other"], ["y"])],
        {"QuickGelu": 1, "Mul": 1}),
}  # fmt: skip


@pytest.mark.parametrize("nodes, ops", PIECES.values(), ids=PIECES)
def test_piece_runs_on_cuda(place, nodes, ops):
    used = {name for node in nodes for name in node.input}
    inputs = [X, OTHER] if "other" in used else [X]
    constants = [constant for constant in (GAIN, SHIFT) if constant.name in used]
    assert_all_on_cuda(place(model(nodes, inputs, [Y], constants), ALL_ON_CUDA), ops)


def test_swish_is_inlined_on_cuda(place):
    built = model([make_node("Swish", ["x"], ["y"])], [X], [Y], opset=24)
    assert_all_on_cuda(place(built, ALL_ON_CUDA), {"Cast": 1, "Mul": 2, "Sigmoid": 1})


# ---- all of it ------------------------------------------------------------------------------------------------------


def one_layer_decoder():
    def linear(source, name, width):
        nodes = [
            make_node("DequantizeLinear", [f"{name}.w", f"{name}.scale"], [f"{name}.wide"], axis=0, block_size=32),
            make_node("MatMul", [source, f"{name}.wide"], [name]),
        ]
        return nodes, [int4(f"{name}.w", WIDTH, width),
                       tensor(f"{name}.scale", np.ones((WIDTH // 32, width)), np.float16)]  # fmt: skip

    widths = {"q": WIDTH, "k": KV_WIDTH, "v": KV_WIDTH}
    projections = [linear("normed", name, width) for name, width in widths.items()]
    out, head = linear("context", "out", WIDTH), linear("silu", "logits", 128)
    ropes = [make_node("RotaryEmbedding", [name, "cos", "sin"], [f"{name}.rotated"], num_heads=heads)
             for name, heads in (("q", HEADS), ("k", KV_HEADS))]  # fmt: skip
    attend = make_node("Attention", ["q.rotated", "k.rotated", "v", "mask", "past_k", "past_v"],
                       ["context", "present_k", "present_v"], q_num_heads=HEADS, kv_num_heads=KV_HEADS)  # fmt: skip
    nodes = [
        *MASK, *ANGLES,
        make_node("Gather", ["embedding", "input_ids"], ["residual"]),
        make_node("RMSNormalization", ["residual", "gain"], ["normed"]),
        *(node for nodes, _ in projections for node in nodes), *ropes, attend, *out[0],
        make_node("Add", ["residual", "out"], ["hidden"]),
        make_node("Sigmoid", ["hidden"], ["gate"]), make_node("Mul", ["hidden", "gate"], ["silu"]), *head[0],
    ]  # fmt: skip
    past, present = past_and_present()
    inputs = [value("input_ids", I64, "batch_size", "sequence_length"), ATTENTION_MASK, POSITION_IDS, *past]
    weights = [weight for _, weights in (*projections, out, head) for weight in weights]
    constants = [*MASK_CONSTANTS, *ANGLE_CONSTANTS, GAIN, tensor("embedding", np.ones((128, WIDTH)), np.float16)]
    logits = value("logits", F16, "batch_size", "sequence_length", 128)
    return model(nodes, inputs, [logits, *present], weights + constants)


def test_decoder_runs_on_cuda_without_a_node_on_the_cpu(place):
    rest = {"Gather": 1, "RMSNormalization": 1, "MatMulNBits": 5, "RotaryEmbedding": 2, "Attention": 1, "Add": 1,
            "QuickGelu": 1}  # fmt: skip
    shared = {op: MASK_OPS.get(op, 0) + ANGLE_OPS.get(op, 0) for op in {*MASK_OPS, *ANGLE_OPS}}
    assert_all_on_cuda(place(one_layer_decoder(), ALL_ON_CUDA), {**shared, **rest})
