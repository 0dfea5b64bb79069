"""Attention over a cache that fills from the start of every row: ONNX Runtime's operator, and a slow reference."""

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

ops = torch.ops.qexport
HEADS, KV, SIZE = 4, 2, 32
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
LEFT, RIGHT = [[1] * 7, [0, 0, 0, 1, 1, 1, 1]], [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operator_session(dtype, width, window, softcap, bits=0, scales=None):
    names = [
        "query",
        "key",
        "value",
        "past_key",
        "past_value",
        "last",
        "total",
        *(["cos", "sin"] if width else ["", ""]),
    ]
    names += ["", "", "", "key_scale", "value_scale"] if bits else []
    kinds = {"last": TensorProto.INT32, "total": TensorProto.INT32}
    kinds |= dict.fromkeys(("key_scale", "value_scale"), TensorProto.FLOAT)
    if bits:
        codes = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
        kinds |= dict.fromkeys(("past_key", "past_value", "present_key", "present_value"), codes)
    quantized = {"kv_cache_bit_width": bits, "k_quant_type": scales, "v_quant_type": scales} if bits else {}
    node = helper.make_node(
        "GroupQueryAttention", names, ["out", "present_key", "present_value"], domain="com.microsoft", scale=0.2,
        num_heads=HEADS, kv_num_heads=KV, do_rotary=int(bool(width)), softcap=softcap, local_window_size=window or -1,
        **quantized,
    )  # fmt: skip
    names = [name for name in names if name]
    inputs = [helper.make_tensor_value_info(n, kinds.get(n, TYPES[dtype]), None) for n in names]
    outputs = [helper.make_tensor_value_info(n, kinds.get(n, TYPES[dtype]), None) for n in node.output]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, outputs), opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), names


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("width, window, softcap", [(0, 0, 0.0), (SIZE, 0, 5.0), (16, 3, 0.0), (SIZE, 3, 5.0)])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.float16, 4e-3)])
def test_it_is_what_the_operator_of_onnx_runtime_computes(dtype, close, width, window, softcap, mask):
    session, names = operator_session(dtype, width, window, softcap)
    angles = torch.arange(32)[:, None] * 0.7 ** torch.arange(width // 2)
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if width else (None, None)
    mask, past = torch.tensor(mask), [torch.zeros(2, KV, 0, SIZE, dtype=dtype)] * 2
    theirs = past
    for step, new in enumerate((7, 1, 1)):
        mask = mask if step == 0 else torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        *_, last, total = ops.real_first(mask, mask[:, -new:])
        given = [draw(2, new, n * SIZE, seed=step).to(dtype) for n in (HEADS, KV, KV)]
        ours, *past = ops.grouped_attention(*given, *past, last, total, *tables, None, None, 0, 0.2, softcap, window)
        feeds = dict(zip(names, [*given, *theirs, last, total, *tables], strict=False))
        out, *theirs = (torch.from_numpy(v) for v in session.run(None, {n: t.numpy() for n, t in feeds.items()}))
        assert (out - ours).abs().max() < close * ours.abs().max()
        for a, b in zip(past, theirs, strict=True):
            assert a.shape == b.shape and (a - b)[:, :, : int(last.min()) + 1].abs().max() < close * b.abs().max()


@pytest.mark.parametrize("scales, shape", [("PER_CHANNEL", (KV, 1, SIZE)), ("PER_TENSOR", (1,))])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_of_codes_is_that_of_the_operator_to_the_bit(bits, scales, shape):
    session, names = operator_session(torch.float32, 0, 0, 0.0, bits, scales)
    steps = [(draw(*shape, seed=9 + i).abs() + 1) / (2 ** (bits - 1) - 1) for i in range(2)]
    kind, width = (torch.int8, SIZE) if bits == 8 else (torch.uint8, SIZE // 2)
    mask, past = torch.ones(2, 7, dtype=torch.long), [torch.zeros(2, KV, 0, width, dtype=kind)] * 2
    theirs = past
    for step, new in enumerate((7, 1, 1)):
        mask = mask if step == 0 else torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        *_, last, total = ops.real_first(mask, mask[:, -new:])
        given = [draw(2, new, n * SIZE, seed=step) for n in (HEADS, KV, KV)]
        given[1][0, 0, :2] = steps[0].flatten()[0] * torch.tensor([0.5, -1000])  # a tie, and one far outside
        ours, *past = ops.grouped_attention(*given, *past, last, total, None, None, *steps, bits, 0.2, 0.0, 0)
        feeds = dict(zip(names, [*given, *theirs, last, total, *steps], strict=True))
        out, *theirs = (torch.from_numpy(v) for v in session.run(None, {n: t.numpy() for n, t in feeds.items()}))
        assert all(a.equal(b) for a, b in zip(past, theirs, strict=True))
        assert (out - ours).abs().max() < 2e-6 * ours.abs().max()


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (3, 0.0), (0, 4.0)])
def test_each_row_is_attention_over_its_own_tokens(window, softcap):
    """A slow float64 reference: one query, one head, one key after another."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    query, key, value = (draw(2, 5, n * SIZE, seed=n).double() for n in (HEADS, KV, 1 + KV))
    value = value[..., : KV * SIZE]
    forward, back, valid, last, total = ops.real_first(mask, mask)
    assert valid.all()
    empty = torch.zeros(2, KV, 0, SIZE, dtype=torch.float64)
    turned = [ops.take_tokens(t, forward) for t in (query, key, value)]
    out, _, _ = ops.grouped_attention(*turned, empty, empty, last, total, *[None] * 4, 0, 0.3, softcap, window)
    out = ops.take_tokens(out, back)
    for row in range(2):
        real = mask[row].nonzero().flatten().tolist()
        for place, token in enumerate(real):
            seen = real[max(0, place + 1 - window) if window else 0 : place + 1]
            for head in range(HEADS):
                group = head * KV // HEADS
                q = query[row, token, head * SIZE : (head + 1) * SIZE]
                scores = torch.stack([q @ key[row, t, group * SIZE : (group + 1) * SIZE] * 0.3 for t in seen])
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                weights = torch.softmax(scores, 0)
                want = sum(
                    w * value[row, t, group * SIZE : (group + 1) * SIZE] for w, t in zip(weights, seen, strict=True)
                )
                assert torch.allclose(out[row, token, head * SIZE : (head + 1) * SIZE], want)


@pytest.mark.parametrize(
    "mask, new, valid",
    [
        ([1, 1, 1], 3, True),
        ([0, 1, 1], 3, True),
        ([1, 0, 0], 3, True),
        ([0, 1, 0], 3, True),
        ([1, 0, 1], 3, False),  # a hole
        ([0, 0, 0], 3, False),  # nothing
        ([1, 1, 0, 1], 1, True),  # one token more
        ([0, 1, 1, 1], 2, True),
        ([1, 1, 0], 1, True),  # the second token is the new one, beside a longer row
        ([1, 0, 1, 0], 1, False),
        ([0, 1, 0], 1, False),
        ([0, 0, 0], 1, False),
        ([1, 1, 0], 2, False),
        ([1, 0, 0, 0], 3, False),
        ([1, 1, 0, 1], 2, False),
    ],
)
def test_padding_is_taken_only_around_the_first_tokens(mask, new, valid):
    mask = torch.tensor([mask, [1] * len(mask)])
    ids = torch.zeros(2, new, dtype=torch.long)
    forward, back, found, last, total = ops.real_first(mask, ids)
    assert found.flatten().tolist() == [valid, True] and total.tolist() == [mask.shape[1]]
    if valid and (new > 1 or mask[0, -1]):
        real = mask[:, -new:].bool()
        turned = ops.take_tokens(real.long(), forward)
        assert turned.sort(1, descending=True).values.equal(turned)
        assert ops.take_tokens(turned, back).equal(real.long())
        assert (last + 1).tolist() == (mask[:, : mask.shape[1] - new].sum(1) + new).tolist()


def test_features_travel_with_their_tokens():
    x, order = draw(2, 3, 5, seed=0), torch.tensor([[2, 0, 1], [1, 1, 0]])
    taken = ops.take_tokens(x, order)
    assert all(taken[b, i].equal(x[b, order[b, i]]) for b in range(2) for i in range(3))
