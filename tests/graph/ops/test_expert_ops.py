"""Experts in one node: the operator and ONNX Runtime's QMoE against loops in float64."""

import math

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.fx import Graph, GraphModule

import qexport.graph.ops  # noqa: F401  registers the operators
from qexport.graph.edit import TensorSpec, add_tensor, get_tensor
from qexport.lower.emitter import Emitter
from qexport.lower.fuse_moe import FusedExperts
from qexport.lower.registry import translate
from qexport.quant.formats import IntegerFormat

ops = torch.ops.qexport
NO_FLOATS = "", [], []  # codes are integers; tests/lower/test_experts.py has 4-bit floats
EXPERTS, CHOSEN, TOKENS, HIDDEN, INNER = 5, 2, 7, 64, 96
INF = float("inf")
PLAIN = dict(bits=4, group=32, symmetric=True, activation="swiglu", biased=False, rounds=False)
GPT_OSS = dict(interleaved=True, alpha=1.702, beta=1.0, limit=1.5, biased=True)
CASES = {
    "4 bits": {}, "zero points": dict(symmetric=False), "8 bits": dict(bits=8, rounds=True),
    "8 bits, zero points": dict(bits=8, symmetric=False, rounds=True), "groups of 16": dict(group=16),
    "rounded input": dict(rounds=True), "rounded, zero points": dict(rounds=True, symmetric=False),
    "clamped, interleaved, biases": GPT_OSS, "the same in 8 bits": GPT_OSS | dict(bits=8, rounds=True, symmetric=False),
    "silu": dict(activation="silu"), "relu": dict(activation="relu"), "gelu": dict(activation="gelu"),
    "longer groups than blocks": dict(group=32, block=16), "one group": dict(hidden=32, inner=32, symmetric=False),
    "as wide as deep": dict(hidden=64, inner=64), "deeper than wide": dict(hidden=32, inner=128, rounds=True),
    "one token": dict(tokens=1), "long groups": dict(group=512, block=256, hidden=512, inner=512),
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A mixture: quantized weights, shares, and what it is in one node."""

    def __init__(self, **changes):
        given = PLAIN | changes
        self.hidden, self.inner = given.get("hidden", HIDDEN), given.get("inner", INNER)
        fmt = IntegerFormat(given["bits"], given["group"], given["symmetric"])
        wide = self.inner * (2 if given["activation"] == "swiglu" else 1)
        self.up = [fmt.round_to_nearest(draw(wide, self.hidden, seed=e) / 6) for e in range(EXPERTS)]
        self.down = [fmt.round_to_nearest(draw(self.hidden, self.inner, seed=50 + e) / 6) for e in range(EXPERTS)]
        biased = given["biased"]
        self.up_bias = [draw(wide, seed=100 + e) for e in range(EXPERTS)] if biased else []
        self.down_bias = [draw(self.hidden, seed=150 + e) for e in range(EXPERTS)] if biased else []
        tokens = given.get("tokens", TOKENS)
        self.x = draw(1, tokens, self.hidden, seed=200)
        best = draw(tokens, EXPERTS, seed=201).softmax(-1).topk(CHOSEN)
        self.shares = ops.expert_shares(best.indices, best.values, EXPERTS)
        self.gate = (
            given["activation"], given.get("interleaved", False), given.get("alpha", 1.0), given.get("beta", 0.0),
            given.get("limit", INF),
        )  # fmt: skip
        self.block, self.rounds = given.get("block", given["group"]), given["rounds"]
        self.numbers = (fmt.stored_bits, fmt.group_size, fmt.group_size, self.block)

    def tensors(self):
        """Lists as the operator takes them."""
        found = []
        for weights, biases in ((self.up, self.up_bias), (self.down, self.down_bias)):
            zeros = [w.zero_point.t().contiguous() for w in weights if w.zero_point is not None]
            found += [[w.codes.t().contiguous() for w in weights], [w.scale.t().contiguous() for w in weights]]
            found += [zeros, biases]
        return found

    def in_pytorch(self, scores=None):
        given = (self.shares, self.shares) if scores is None else (scores, None)
        return ops.quantized_experts(
            self.x, *given, CHOSEN, *self.tensors(), *self.numbers, *self.gate, self.rounds, *NO_FLOATS
        )  # fmt: skip

    def in_onnxruntime(self):
        module = GraphModule(torch.nn.Module(), Graph())
        graph = module.graph
        names = [f"{side}.{name}" for side in ("up", "down") for name in ("codes", "scales", "zeros", "biases")]
        x, shares = (graph.placeholder(name) for name in ("x", "shares"))
        for node, value in ((x, self.x), (shares, self.shares)):
            node.meta["spec"] = TensorSpec(torch.float32, tuple(value.shape))
        lists = [
            [add_tensor(graph, f"{name}{e}", tensor) for e, tensor in enumerate(tensors)]
            for name, tensors in zip(names, self.tensors(), strict=True)
        ]
        arguments = (x, shares, shares, CHOSEN, *lists, *self.numbers, *self.gate, self.rounds, *NO_FLOATS)
        node = graph.call_function(ops.quantized_experts.default, arguments)
        node.meta = {"spec": x.meta["spec"], "experts": FusedExperts("experts", (), ())}
        emit = Emitter()
        emit.enter("test", lambda name: get_tensor(module, name))
        for given, value in ((x, self.x), (shares, self.shares)):
            emit.values[given] = ir.Value(
                name=given.name, shape=ir.Shape(value.shape), type=ir.TensorType(ir.DataType.FLOAT)
            )
        made = translate(emit, node)
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(self.x.shape)
        built = ir.Graph(
            [emit.values[x], emit.values[shares]], [made], nodes=emit.nodes, opset_imports={"": 23, "com.microsoft": 1},
            initializers=list(emit.initializers.values()), name="test",
        )  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        data = ir.to_proto(ir.Model(built, ir_version=11)).SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"x": self.x.numpy(), "shares": self.shares.numpy()})[0])

    def slowly(self):
        """Token by token and expert by expert in float64."""
        result = torch.zeros(self.x.shape, dtype=torch.float64)
        for token, row in enumerate(self.x[0].double()):
            for expert, share in enumerate(self.shares[token].tolist()):
                inner = self._rounded(row) @ self.up[expert].dequantize().double().t()
                inner = _gated(inner + (self.up_bias[expert] if self.up_bias else 0), *self.gate)
                out = self._rounded(inner) @ self.down[expert].dequantize().double().t()
                result[0, token] += share * (out + (self.down_bias[expert] if self.down_bias else 0))
        return result

    def _rounded(self, row):
        """To 8 bits by the largest magnitude of every block."""
        if not self.rounds:
            return row
        blocks = row.view(-1, self.block)
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / step).round() * step).flatten()


def _gated(row, activation, interleaved, alpha, beta, limit):
    if activation == "silu":
        return row / (1 + torch.exp(-row))
    if activation == "relu":
        return row.clamp(min=0)
    if activation == "gelu":
        return 0.5 * row * (1 + torch.tanh(math.sqrt(2 / math.pi) * (row + 0.044715 * row**3)))
    half = len(row) // 2
    pairs = row.view(half, 2).unbind(1) if interleaved else (row[:half], row[half:])
    g, linear = pairs[0].clamp(max=limit), pairs[1].clamp(-limit, limit)
    return g / (1 + torch.exp(-alpha * g)) * (linear + beta)


def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_operator_and_kernel_compute_what_loops_compute(name):
    case = Case(**CASES[name])
    want = case.slowly()
    # Of a rounded input a code may flip in float32: one step of 127 of one input among many.
    bound = 5e-3 if case.rounds else 1e-5
    assert error(case.in_pytorch(), want) < bound
    assert error(case.in_onnxruntime(), want) < bound
    assert error(case.in_onnxruntime(), case.in_pytorch().double()) < bound


def test_a_kernel_that_rounds_is_told_from_one_that_does_not():
    exact, rounded = Case(), Case(rounds=True)
    assert error(rounded.in_onnxruntime(), exact.slowly()) > 2e-3


def test_scores_are_as_good_as_shares_that_add_up_to_one():
    case = Case()
    case.shares = case.shares / case.shares.sum(-1, keepdim=True)
    scores = case.shares.clamp_min(1e-30).log()
    assert error(case.in_pytorch(scores), case.slowly()) < 1e-5


def test_shares_are_those_of_a_loop_and_an_expert_may_be_chosen_twice():
    index, weights = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0.5, 0.25], [0.5, 0.125]])
    shares = ops.expert_shares(index, weights, 4)
    assert shares.tolist() == [[0.25, 0, 0.5, 0], [0, 0.625, 0, 0]]


def test_shares_have_the_derivative_of_finite_differences():
    index, weights = torch.tensor([[2, 0], [1, 3]]), draw(2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.expert_shares(index, w, 4), (weights,))


def test_what_tracing_sees_is_what_comes_out():
    case, checks = Case(symmetric=False), ("test_schema", "test_faketensor")
    numbers = *case.numbers, *case.gate, False, *NO_FLOATS
    arguments = (case.x, case.shares, case.shares, CHOSEN, *case.tensors(), *numbers)
    torch.library.opcheck(ops.quantized_experts.default, arguments, test_utils=checks)
    shares = (torch.tensor([[2, 0]]), torch.ones(1, 2), 4)
    torch.library.opcheck(ops.expert_shares.default, shares, test_utils=checks)
