"""Mixtures of experts: what tokens give each expert, and the chosen ones of quantized weights as one kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...quant.affine import blockwise_fake_quantize
from ...quant.formats.small_floats import decoded
from .quant import dequantize_linear


@torch.library.custom_op("qexport::expert_shares", mutates_args=())
def expert_shares(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """What every token gives each expert: the weight of those that it chose, and zero to the others.

    Args:
        index: int64 [tokens, chosen], in [0, experts - 1]; weights: floating point, of the same shape.

    Returns:
        [tokens, experts] of the weights' dtype.
    """
    chosen = index[..., None] == torch.arange(experts, device=index.device)
    return torch.where(chosen, weights[..., None], 0.0).sum(1)


@expert_shares.register_fake
def _(index, weights, experts):
    return weights.new_empty((index.shape[0], experts))


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx, gradient: Tensor) -> tuple[None, Tensor, None]:
    (index,) = ctx.saved_tensors
    return None, gradient.gather(1, index), None


expert_shares.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("qexport::more_experts", mutates_args=())
def more_experts(total: Tensor, part: Tensor, traced: int, experts: int) -> Tensor:
    """Stands for experts that capture does not trace, and is in no captured graph.

    Args:
        total: the sum of what the first `traced` of all `experts` add; part: what the last of these adds.
    """
    raise NotImplementedError("experts that were not traced are copied when the graph is complete")


@more_experts.register_fake
def _(total, part, traced, experts):
    return torch.empty_like(total)


@torch.library.custom_op("qexport::quantized_experts", mutates_args=())
def quantized_experts(
    x: Tensor, scores: Tensor, shares: Tensor | None, k: int,
    up_codes: Sequence[Tensor], up_scales: Sequence[Tensor], up_zeros: Sequence[Tensor], up_biases: Sequence[Tensor],
    down_codes: Sequence[Tensor], down_scales: Sequence[Tensor], down_zeros: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    bits: int, up_group: int, down_group: int, block_size: int,
    activation: str, interleaved: bool, alpha: float, beta: float, limit: float, rounds: bool,
    floats: str, up_wholes: Sequence[Tensor], down_wholes: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The k best experts of every token, each by its share, as one kernel.

    One expert is down(gate(up(x))), a linear each; see `gate`. Lists have a tensor for every expert, or none at all.

    Args:
        x: [..., K].
        scores: [tokens, experts]; the k largest of a row are its experts.
        shares: of the same shape, not negative; None: the softmax of the scores of the chosen ones.
        up_codes, up_scales, up_zeros, down_codes, down_scales, down_zeros, bits: weights [K, N] and [I, K] as in
            `dequantize_linear` along axis 0; up_group, down_group: features that share a scale; biases: [N] and [K].
        block_size: the same in the kernel: both groups, or a part of them. The file then has each scale several times.
        activation, interleaved, alpha, beta, limit: see `gate`.
        floats: name of the format of small floats that the weights are in, and then they are as in `dequantize_floats`,
            codes [N, K]; empty for integers.
        up_wholes, down_wholes: the scale of each whole weight, of formats that have one.
        rounds: the kernel rounds what both linears read to 8 bits in blocks, as MatMulNBits does at accuracy level 4.

    Returns:
        [..., K].
    """
    rows, best = x.reshape(-1, x.shape[-1]), scores.topk(k)
    parts = best.values.softmax(-1) if shares is None else shares.gather(1, best.indices)
    result = torch.zeros_like(rows)

    def project(x: Tensor, e: int, codes, scales, zeros, biases, group: int, wholes) -> Tensor:
        if floats:
            weight = decoded(codes[e], scales[e], wholes[e] if wholes else None, floats).t().to(x.dtype)
        else:
            weight = dequantize_linear(codes[e], scales[e], zeros[e] if zeros else None, 0, group, bits)
        product = (blockwise_fake_quantize(x, block_size) if rounds else x) @ weight
        return product + biases[e] if biases else product

    for expert in range(len(up_codes)):
        token, place = (best.indices == expert).nonzero(as_tuple=True)
        if len(token):
            inner = project(rows[token], expert, up_codes, up_scales, up_zeros, up_biases, up_group, up_wholes)
            inner = gate(inner, activation, interleaved, alpha, beta, limit)
            out = project(inner, expert, down_codes, down_scales, down_zeros, down_biases, down_group, down_wholes)
            result.index_add_(0, token, out * parts[token, place, None])
    return result.view(x.shape)


@quantized_experts.register_fake
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gate(x: Tensor, activation: str, interleaved: bool, alpha: float, beta: float, limit: float) -> Tensor:
    """What stands between the two linears of an expert.

    Args:
        x: [..., N].
        activation: "relu", "silu" or "gelu" (by tanh) of x; "swiglu": g * sigmoid(alpha * g) * (l + beta), where g and
            l are the halves of x, or (`interleaved`) every other element from 0 and from 1, g no larger than limit and
            l no further from zero than it.

    Returns:
        [..., N], of swiglu [..., N / 2].
    """
    if activation != "swiglu":
        functions = {"relu": torch.relu, "silu": torch.nn.functional.silu}
        return functions.get(activation, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))(x)
    g, linear = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    g, linear = g.clamp(max=limit), linear.clamp(-limit, limit)
    return g * torch.sigmoid(alpha * g) * (linear + beta)
