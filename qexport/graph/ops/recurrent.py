"""The steps of a recurrent layer, behind the product of its whole input with the weight of the input.

PyTorch would trace them one by one, for one length alone. What comes in at all steps is multiplied at once, as a linear
(`gates`); here is what has to wait for the step before.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...quant.affine import blockwise_fake_quantize
from .derivatives import differentiate
from .quant import dequantize_linear

_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
# The grid of uint8 codes that ONNX Runtime makes of [-1, 1], in which the states of an LSTM lie.
STATE_STEP, STATE_ZERO = 2 / 255, 127


def _float_steps(
    gates: Tensor, hidden: Tensor, cell: Tensor | None, weight: Tensor, bias: Tensor | None, lengths: Tensor | None,
    reverse: bool, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _steps(gates, hidden, cell, lambda h: torch.nn.functional.linear(h, weight, bias), lengths, reverse, kind)


def _steps(
    gates: Tensor, hidden: Tensor, cell: Tensor | None, product: Callable[[Tensor], Tensor], lengths: Tensor | None,
    reverse: bool, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `recurrent_steps`; product: of hidden states [batch, hidden] with their weight, and the bias."""
    made: list[Tensor] = [gates] * gates.shape[0]
    states: tuple[Tensor, ...] = (hidden,) if cell is None else (hidden, cell)
    for step in reversed(range(gates.shape[0])) if reverse else range(gates.shape[0]):
        new = _step(gates[step], product(states[0]), states, kind)
        out = new[0]
        if lengths is not None:
            within = (lengths > step)[:, None]
            new = tuple(torch.where(within, after, before) for after, before in zip(new, states, strict=True))
            out = torch.where(within, out, torch.zeros_like(out))
        states, made[step] = new, out
    outputs = torch.stack(made) if made else gates.new_empty((0, *hidden.shape))
    return outputs, states[0].clone(), states[1].clone() if len(states) > 1 else hidden.new_empty(0)


def _step(inward: Tensor, within: Tensor, states: tuple[Tensor, ...], kind: str) -> tuple[Tensor, ...]:
    if kind == "lstm":
        i, f, g, o = (inward + within).chunk(4, dim=-1)
        cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if kind == "gru":
        (r, z, n), (r_in, z_in, n_in) = within.chunk(3, dim=-1), inward.chunk(3, dim=-1)
        new = (n_in + (r + r_in).sigmoid() * n).tanh()
        return (new + (z + z_in).sigmoid() * (states[0] - new),)
    total = inward + within
    return (total.tanh() if kind == "rnn_tanh" else total.relu(),)


@torch.library.custom_op("qexport::recurrent_steps", mutates_args=())
def recurrent_steps(
    gates: Tensor, hidden: Tensor, cell: Tensor | None, weight: Tensor, bias: Tensor | None, lengths: Tensor | None,
    reverse: bool, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer of a recurrent network in one direction.

    Args:
        gates: [steps, batch, gates * hidden], what its input contributes, in the order that torch.nn has.
        hidden, cell: the first states, [batch, hidden]; cell: of an LSTM alone.
        weight: [gates * hidden, hidden], of the state of the step before; bias: [gates * hidden].
        lengths: [batch], steps of each row that count; behind them outputs are 0. None: all.
        reverse: from the last step to the first.
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".

    Returns:
        the hidden state of every step, [steps, batch, hidden], the last one, and the last cell; that is empty where
        there is none.
    """
    return _float_steps(gates, hidden, cell, weight, bias, lengths, reverse, kind)


@torch.library.custom_op("qexport::recurrent_steps_nbits", mutates_args=())
def recurrent_steps_nbits(
    gates: Tensor, hidden: Tensor, cell: Tensor | None, codes: Tensor, scale: Tensor, zero_point: Tensor | None,
    bias: Tensor | None, lengths: Tensor | None, reverse: bool, kind: str, bits: int, group_size: int,
    block_size: int, rounds: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with the weight as codes, its product the kernel MatMulNBits in every step.

    Args:
        codes: [hidden, gates * hidden], scale, zero_point, bits, group_size, block_size: as `matmul_nbits`.
        rounds: the kernel rounds states to 8 bits in blocks, as at accuracy level 4. Every row of a batch is rounded by
            itself, and so is every step: a stream that is fed in parts gives the same.
    """
    weight = dequantize_linear(codes, scale, zero_point, 0, group_size, bits)

    def product(h: Tensor) -> Tensor:
        found = (blockwise_fake_quantize(h, block_size) if rounds else h) @ weight
        return found if bias is None else found + bias

    return _steps(gates, hidden, cell, product, lengths, reverse, kind)


@torch.library.custom_op("qexport::lstm_steps_int8", mutates_args=())
def lstm_steps_int8(
    gates: Tensor, hidden: Tensor, cell: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    lengths: Tensor | None, reverse: bool, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of an LSTM that is one kernel of ONNX Runtime with its int8 product, DynamicQuantizeLSTM.

    The kernel takes a range over all that it reads. Two more features and two more states, which multiply nothing, hold
    the ends of a range that does not change: neither rows nor steps depend on one another.

    Args:
        codes: int8 [hidden, 4 * hidden]; scale: [4 * hidden].
    """
    weight = dequantize_linear(codes, scale, None, 1, 0, 8)

    def product(h: Tensor) -> Tensor:
        rounded = (torch.round(h / STATE_STEP) + STATE_ZERO).clamp(0, 255) - STATE_ZERO
        found = (rounded * STATE_STEP) @ weight
        return found if bias is None else found + bias

    return _steps(gates, hidden, cell, product, lengths, reverse, kind)


def _fake(gates, hidden, *rest):
    kind = next(argument for argument in rest if isinstance(argument, str))
    cell = torch.empty_like(hidden) if _STATES[kind] == 2 else hidden.new_empty(0)
    return gates.new_empty((*gates.shape[:2], hidden.shape[1])), torch.empty_like(hidden), cell


recurrent_steps.register_fake(_fake)
recurrent_steps_nbits.register_fake(_fake)
lstm_steps_int8.register_fake(_fake)
differentiate(recurrent_steps, _float_steps)
