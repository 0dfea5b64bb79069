"""The steps of a recurrent layer: an operator with the product in front of it, or a Scan over products of codes.

An operator multiplies its input itself, so it takes the place of a linear and the steps behind it: of a float one, or
of an LSTM's in 8 bits with a static range. Any other product is one for all steps, what is left of the layer a Scan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from ...artifact.manifest import STATIC_LSTM
from ...graph.edit import dtype_of
from ...graph.meta import Meta
from ...graph.ops.recurrent import STATE_STEP, STATE_ZERO
from ...graph.schema import Arguments
from ...graph.views import LinearCall, size_at, sizes_of
from ..emitter import ONNX_DTYPE, Emitter
from ..recurrent_form import StaticProduct, static_product
from ..registry import translates
from .quantized import packed_codes, packed_scales

ops = torch.ops.qexport
_FAR = 20  # where sigmoid and tanh are 0 or 1 in float32
Steps = tuple[ir.Value, ir.Value, ir.Value]
Product = Callable[[ir.Value], ir.Value]


@dataclass(frozen=True)
class _Kind:
    """A recurrent operator of ONNX.

    Attributes:
        op_type: its name; states: how many tensors it hands from step to step.
        order: of the gates of PyTorch's weights, as the operator wants them.
        activations: of one direction; empty for those that it takes of itself.
    """

    op_type: str
    states: int
    order: tuple[int, ...]
    activations: tuple[str, ...] = ()


_KINDS = {
    "lstm": _Kind("LSTM", 2, (0, 3, 1, 2)),
    "gru": _Kind("GRU", 1, (1, 0, 2)),
    "rnn_tanh": _Kind("RNN", 1, (0,), ("Tanh",)),
    "rnn_relu": _Kind("RNN", 1, (0,), ("Relu",)),
}


@translates(ops.recurrent_steps.default)
def _float_steps(emit: Emitter, node: Node, given: Arguments) -> Steps:
    linear = LinearCall.match(given.gates)
    tensors = () if linear is None else (linear.weight, linear.bias, given.weight, given.bias)
    if linear is not None and all(t is None or t.op == "get_attr" for t in tensors):
        return _operator(emit, given, linear)

    def product(h: ir.Value) -> ir.Value:
        transposed = emit.op("Transpose", emit.get(given.weight), perm=[1, 0])
        return _plus(emit, emit.op("MatMul", h, transposed), given.bias)

    return _scan(emit, node, given, product)


@translates(ops.recurrent_steps_nbits.default)
def _steps_nbits(emit: Emitter, node: Node, given: Arguments) -> Steps:
    (k, n), bits, block = sizes_of(given.codes), given.bits, given.block_size
    weight = packed_codes(emit, given.codes, bits, "packed", [n, -(-k // block), block * bits // 8])
    scales, zeros = packed_scales(emit, given.codes, given.scale, given.zero_point, bits, given.group_size, block)

    def product(h: ir.Value) -> ir.Value:
        return emit.op(
            "MatMulNBits", h, weight, scales, zeros, None, emit.get(given.bias), domain="com.microsoft", K=k, N=n,
            bits=bits, block_size=block, accuracy_level=4 if given.rounds else 1,
        )  # fmt: skip

    return _scan(emit, node, given, product)


@translates(ops.lstm_steps_int8.default)
def _steps_int8(emit: Emitter, node: Node, given: Arguments) -> Steps:
    made = static_product(given.gates)
    if made is not None:
        return _static_lstm(emit, node, given, made)
    step, zero = emit.constant(STATE_STEP, torch.float32), emit.constant(STATE_ZERO, torch.uint8)
    weight = emit.op("DequantizeLinear", emit.get(given.codes), emit.get(given.scale), axis=1)

    def product(h: ir.Value) -> ir.Value:
        codes = emit.op("QuantizeLinear", h, step, zero)
        return _plus(emit, emit.op("MatMul", emit.op("DequantizeLinear", codes, step, zero), weight), given.bias)

    return _scan(emit, node, given, product)


def _static_lstm(emit: Emitter, node: Node, given: Arguments, made: StaticProduct) -> Steps:
    """An LSTM with ranges that do not depend on what it reads.

    DynamicQuantizeLSTM takes the range of its input over all steps and rows, and that of the states over the rows of a
    step. So the input gets two more features, the least and the largest value of its calibrated grid, and there are two
    more states, which stay at 1 and -1: their forget gates are open, their cells far out. No weight reads any of them.
    """
    (width, rows), dtype = sizes_of(made.codes), torch.float32
    states = rows // 4

    def columns(values: torch.Tensor, beside: Sequence[int] = (0, 0, 0, 0)) -> torch.Tensor:
        """Gates in the order of ONNX, each with two columns more; beside: what these hold, by gate."""
        gates = [values.chunk(4, dim=-1)[gate] for gate in _KINDS["lstm"].order]
        more = [values.new_full((*values.shape[:-1], 2), held) for held in beside]
        return torch.cat([part for pair in zip(gates, more, strict=True) for part in pair], dim=-1)

    def weight(codes: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(columns(codes), (0, 0, 0, 2))[None]

    def scales(scale: torch.Tensor) -> torch.Tensor:
        return columns(scale, (1, 1, 1, 1))[None]

    def biases(scale: torch.Tensor, inner: torch.Tensor | None, outer: torch.Tensor | None) -> torch.Tensor:
        none = torch.zeros_like(scale)
        first = columns(none if inner is None else inner, (-_FAR, _FAR, _FAR, 0))
        return torch.cat([first, columns(none if outer is None else outer)])[None]

    def ends(x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        """Two more in the last axis."""
        one, last = emit.constant([0, 1]), emit.constant([-1])
        return emit.op("Pad", emit.op("Pad", x, one, low, last), one, high, last)

    low, high = (
        emit.derived(made.step, name, [], dtype, lambda s, n=code: (s * n).reshape(()))
        for name, code in (("low", -128), ("high", 127))
    )
    x = ends(emit.op("Clip", emit.get(made.x), low, high), low, high)
    many = 4 * (states + 2)
    axis, zeros = emit.constant([0]), emit.constant([[0] * many], torch.int8)
    first = [
        ends(emit.op("Unsqueeze", emit.get(state), axis), *(emit.constant(end, dtype) for end in (far, -far)))
        for state, far in ((given.hidden, 1.0), (given.cell, float(_FAR)))
    ]
    lengths = None if given.lengths is None else emit.cast(emit.get(given.lengths), torch.int32)
    y, *last = emit.several(
        3, STATIC_LSTM, x,
        emit.derived(made.codes, "gates", [1, width + 2, many], torch.int8, weight),
        emit.derived(given.codes, "gates", [1, states + 2, many], torch.int8, weight),
        emit.derived(made.scale, "biases", [1, 2 * many], dtype, biases, made.bias, given.bias),
        lengths, *first, None,
        emit.derived(made.scale, "gates", [1, many], dtype, scales), zeros,
        emit.derived(given.scale, "gates", [1, many], dtype, scales), zeros,
        domain="com.microsoft", name=made.product.meta[Meta.LINEAR], hidden_size=states + 2,
        direction="reverse" if given.reverse else "forward",
    )  # fmt: skip
    begin, stop, at = emit.constant([0]), emit.constant([states]), emit.constant([-1])
    y, *last = (emit.op("Slice", value, begin, stop, at) for value in (y, *last))
    last = [emit.op("Squeeze", value, axis) for value in last]
    return emit.op("Squeeze", y, emit.constant([1])), last[0], last[1]


def _operator(emit: Emitter, given: Arguments, linear: LinearCall) -> Steps:
    """One layer in one direction, with what the linear in front of it computes."""
    kind, dtype = _KINDS[given.kind], dtype_of(linear.weight)
    (rows, hidden), width, gates = sizes_of(given.weight), sizes_of(linear.weight)[1], len(kind.order)

    def ordered(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight.chunk(gates)[gate] for gate in kind.order])[None]

    def both(known: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        """Biases of what comes in and of what is handed on."""
        pair = (known, torch.zeros_like(known) if other is None else other)
        return torch.cat([ordered(bias) for bias in (pair if linear.bias is not None else pair[::-1])], dim=1)

    weight_in = emit.derived(linear.weight, "gates", [1, rows, width], dtype, ordered)
    weight_within = emit.derived(given.weight, "gates", [1, rows, hidden], dtype, ordered)
    known = [bias for bias in (linear.bias, given.bias) if bias is not None]
    bias = emit.derived(known[0], "gates", [1, 2 * rows], dtype, both, *(known[1:] or [None])) if known else None
    lengths = None if given.lengths is None else emit.cast(emit.get(given.lengths), torch.int32)
    axis = emit.constant([0])
    first = [emit.op("Unsqueeze", emit.get(state), axis) for state in (given.hidden, given.cell) if state is not None]
    y, *last = emit.several(
        1 + kind.states, kind.op_type, emit.get(linear.x), weight_in, weight_within, bias, lengths, *first,
        hidden_size=hidden, direction="reverse" if given.reverse else "forward",
        linear_before_reset=1 if kind.op_type == "GRU" else None,
        more={"activations": list(kind.activations) or None},
    )  # fmt: skip
    last = [emit.op("Squeeze", value, axis) for value in last]
    return emit.op("Squeeze", y, emit.constant([1])), last[0], last[-1]


def _scan(emit: Emitter, node: Node, given: Arguments, product: Product) -> Steps:
    """A loop over the steps; what multiplies the state in each of them is `product`."""
    kind, dtype, hidden = _KINDS[given.kind], dtype_of(given.gates), size_at(given.hidden, 1)
    gates, first = emit.get(given.gates), [emit.get(s) for s in (given.hidden, given.cell) if s is not None]
    inputs = [gates]
    if given.lengths is not None:
        steps = emit.op("Squeeze", emit.op("Shape", gates, start=0, end=1), emit.constant([0]))
        places = emit.op("Range", emit.constant(0), steps, emit.constant(1))
        rows = emit.cast(emit.op("Unsqueeze", emit.get(given.lengths), emit.constant([0])), torch.int64)
        within = emit.op("Less", emit.op("Unsqueeze", places, emit.constant([1])), rows)
        inputs.append(emit.op("Unsqueeze", within, emit.constant([2])))
    name = emit.named(f"{node.name}/step")
    with emit.branch(f"{name}/") as nodes:
        states = [_typed(f"{name}/state_{i}", dtype) for i in range(kind.states)]
        now = _typed(f"{name}/gates", dtype)
        counts = [_typed(f"{name}/within", torch.bool)] if given.lengths is not None else []
        new = _STEPS[kind.op_type](emit, now, product(states[0]), states, hidden, kind)
        out = new[0]
        if counts:
            out = emit.op("Where", counts[0], out, emit.constant(0, dtype))
            new = [emit.op("Where", counts[0], after, before) for after, before in zip(new, states, strict=True)]
        results = [emit.op("Identity", value) if value in new[:i] else value for i, value in enumerate(new)]
        results.append(emit.op("Identity", out))
    for value in results:
        value.type = ir.TensorType(ONNX_DTYPE[dtype])
    body = ir.Graph([*states, now, *counts], results, nodes=nodes, name=name)
    way, many = (1 if given.reverse else 0), len(inputs)
    made = tuple(ir.Value(name=f"{name}:{i}") for i in range(kind.states + 1))
    attributes: dict[str, Any] = {
        "body": body, "num_scan_inputs": many, "scan_input_directions": [way] * many, "scan_output_directions": [way],
    }  # fmt: skip
    emit.nodes.append(ir.node("Scan", [*first, *inputs], attributes, outputs=made, name=name))
    return made[-1], made[0], made[kind.states - 1]


def _lstm(
    emit: Emitter, now: ir.Value, within: ir.Value, states: Sequence[ir.Value], hidden: int, kind: _Kind
) -> list[ir.Value]:
    total = emit.op("Add", now, within)
    both, g, o = emit.several(3, "Split", total, emit.constant([2 * hidden, hidden, hidden]), axis=-1)
    i, f = emit.several(2, "Split", emit.op("Sigmoid", both), emit.constant([hidden, hidden]), axis=-1)
    cell = emit.op("Add", emit.op("Mul", f, states[1]), emit.op("Mul", i, emit.op("Tanh", g)))
    return [emit.op("Mul", emit.op("Sigmoid", o), emit.op("Tanh", cell)), cell]


def _gru(
    emit: Emitter, now: ir.Value, within: ir.Value, states: Sequence[ir.Value], hidden: int, kind: _Kind
) -> list[ir.Value]:
    parts = emit.constant([2 * hidden, hidden])
    (both_in, n_in), (both, n) = (emit.several(2, "Split", value, parts, axis=-1) for value in (now, within))
    chosen = emit.op("Sigmoid", emit.op("Add", both_in, both))
    r, z = emit.several(2, "Split", chosen, emit.constant([hidden, hidden]), axis=-1)
    new = emit.op("Tanh", emit.op("Add", n_in, emit.op("Mul", r, n)))
    return [emit.op("Add", new, emit.op("Mul", z, emit.op("Sub", states[0], new)))]


def _plain(
    emit: Emitter, now: ir.Value, within: ir.Value, states: Sequence[ir.Value], hidden: int, kind: _Kind
) -> list[ir.Value]:
    return [emit.op(kind.activations[0], emit.op("Add", now, within))]


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _plain}


def _typed(name: str, dtype: torch.dtype) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ONNX_DTYPE[dtype]))


def _plus(emit: Emitter, value: ir.Value, bias: Node | None) -> ir.Value:
    return value if bias is None else emit.op("Add", value, emit.get(bias))

