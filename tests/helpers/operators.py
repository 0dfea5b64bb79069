"""Calls of operators by the operator they are of, in families, and a module that makes all calls of one.

Each is given x, float32 [batch, 6, 8], n, int64 of the same shape, and t, bool of the same shape; what stands behind
the operator's name says what is special.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

a = torch.ops.aten
Call = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]


def _over(f: Callable[[Tensor], Tensor]) -> Call:
    """A call of an operator of numbers in (-1, 1)."""
    return lambda x, n, t: f(x.tanh())


def _rows(x: Tensor) -> Tensor:
    """[batch, 2, 3, 8]: pictures of 3 by 8."""
    return a.view(x, [x.shape[0], 2, 3, 8])


FUNCTIONS: dict[str, Call] = {
    "abs.default": lambda x, n, t: a.abs(x),
    "abs.default of integers": lambda x, n, t: a.abs(n),
    "acos.default": _over(a.acos),
    "acosh.default": lambda x, n, t: a.acosh(x.abs() + 1),
    "asin.default": _over(a.asin),
    "asinh.default": lambda x, n, t: a.asinh(x),
    "atan.default": lambda x, n, t: a.atan(x),
    "atan.default of integers": lambda x, n, t: a.atan(n),
    "atanh.default": _over(a.atanh),
    "atan2.default": lambda x, n, t: a.atan2(x, x.flip(1)),
    "atan2.default of zeros": lambda x, n, t: a.atan2(n.float(), n.flip(1).relu().float()),
    "ceil.default": lambda x, n, t: a.ceil(x),
    "ceil.default of integers": lambda x, n, t: a.ceil(n),
    "cos.default": lambda x, n, t: a.cos(x),
    "cosh.default": lambda x, n, t: a.cosh(x),
    "erf.default": lambda x, n, t: a.erf(x),
    "exp.default": lambda x, n, t: a.exp(x),
    "exp.default of integers": lambda x, n, t: a.exp(n),
    "expm1.default": lambda x, n, t: a.expm1(x),
    "floor.default": lambda x, n, t: a.floor(x),
    "floor.default of integers": lambda x, n, t: a.floor(n),
    "isinf.default": lambda x, n, t: a.isinf(1 / x.relu()),
    "isinf.default of integers": lambda x, n, t: a.isinf(n),
    "isnan.default": lambda x, n, t: a.isnan(x.log()),
    "log.default": lambda x, n, t: a.log(x.abs() + 0.1),
    "log10.default": lambda x, n, t: a.log10(x.abs() + 0.1),
    "log1p.default": lambda x, n, t: a.log1p(x.abs()),
    "log2.default": lambda x, n, t: a.log2(x.abs() + 0.1),
    "neg.default": lambda x, n, t: a.neg(n),
    "reciprocal.default": lambda x, n, t: a.reciprocal(x),
    "round.default": lambda x, n, t: a.round(n / 2),
    "round.default of integers": lambda x, n, t: a.round(n),
    "rsqrt.default": lambda x, n, t: a.rsqrt(x.abs() + 0.1),
    "rsqrt.default of integers": lambda x, n, t: a.rsqrt(n.abs() + 1),
    "sigmoid.default": lambda x, n, t: a.sigmoid(x),
    "sign.default": lambda x, n, t: a.sign(n),
    "sin.default": lambda x, n, t: a.sin(x),
    "sinh.default": lambda x, n, t: a.sinh(x),
    "sqrt.default": lambda x, n, t: a.sqrt(n.abs()),
    "tan.default": _over(a.tan),
    "tanh.default": lambda x, n, t: a.tanh(x),
    "trunc.default": lambda x, n, t: a.trunc(x * 3),
    "trunc.default of integers": lambda x, n, t: a.trunc(n),
    "elu.default": lambda x, n, t: a.elu(x),
    "elu.default with scales": lambda x, n, t: a.elu(x, 1.5, 1.1, 0.7),
    "gelu.default": lambda x, n, t: a.gelu(x),
    "gelu.default by tanh": lambda x, n, t: a.gelu(x, approximate="tanh"),
    "hardtanh.default": lambda x, n, t: a.hardtanh(x, -0.5, 0.7),
    "leaky_relu.default": lambda x, n, t: a.leaky_relu(x, 0.2),
    "relu.default": lambda x, n, t: a.relu(x),
    "relu.default of integers": lambda x, n, t: a.relu(n),
}

PAIRS: dict[str, Call] = {
    "add.Tensor": lambda x, n, t: a.add(x, n),
    "add.Tensor with a factor": lambda x, n, t: a.add(x, x, alpha=-3),
    "add.Tensor of truth values": lambda x, n, t: a.add(t, t.flip(1)),
    "add.Scalar": lambda x, n, t: a.add.Scalar(x, 2.5),
    "sub.Tensor": lambda x, n, t: a.sub(n, x, alpha=2),
    "sub.Scalar": lambda x, n, t: a.sub.Scalar(n, 2),
    "mul.Tensor": lambda x, n, t: a.mul(x, t),
    "mul.Scalar": lambda x, n, t: a.mul.Scalar(n, 3),
    "div.Tensor": lambda x, n, t: a.div(n, n.abs() + 1),
    "div.Scalar": lambda x, n, t: a.div.Scalar(n, 4),
    "div.Tensor_mode floor": lambda x, n, t: a.div(x * 9, x.flip(1), rounding_mode="floor"),
    "div.Tensor_mode floor of integers": lambda x, n, t: a.div(n, n.flip(1).abs() + 1, rounding_mode="floor"),
    "div.Tensor_mode trunc of integers": lambda x, n, t: a.div(n, n.flip(1).abs() + 1, rounding_mode="trunc"),
    "div.Scalar_mode": lambda x, n, t: a.div.Scalar_mode(x, 0.1, rounding_mode="trunc"),
    "div.Scalar_mode floor": lambda x, n, t: a.div.Scalar_mode(x.round(), 0.1, rounding_mode="floor"),
    "fmod.Tensor": lambda x, n, t: a.fmod(x * 5, x.flip(1)),
    "fmod.Scalar": lambda x, n, t: a.fmod(n, -4),
    "remainder.Tensor": lambda x, n, t: a.remainder(x * 5, x.flip(1)),
    "remainder.Scalar": lambda x, n, t: a.remainder(n, -4),
    "remainder.Scalar of floats": lambda x, n, t: a.remainder(x, -0.7),
    "pow.Tensor_Tensor": lambda x, n, t: a.pow(x.abs(), x),
    "pow.Tensor_Scalar": lambda x, n, t: a.pow(n, 3),
    "pow.Scalar": lambda x, n, t: a.pow.Scalar(1.5, x),
    "maximum.default": lambda x, n, t: a.maximum(x, n.float()),
    "maximum.default of truth values": lambda x, n, t: a.maximum(t, t.flip(1)),
    "minimum.default": lambda x, n, t: a.minimum(n, n.flip(1)),
    "clamp.default": lambda x, n, t: a.clamp(x, -0.5, 0.5),
    "clamp.default of integers by floats": lambda x, n, t: a.clamp(n, -1.5, 2.5),
    "clamp.default from below": lambda x, n, t: a.clamp(n, 1),
    "clamp.Tensor": lambda x, n, t: a.clamp(x, x.flip(1) - 1, None),
    "eq.Tensor": lambda x, n, t: a.eq(n, n.flip(1)),
    "eq.Scalar": lambda x, n, t: a.eq(n, 2),
    "ne.Tensor": lambda x, n, t: a.ne(t, t.flip(1)),
    "ne.Scalar": lambda x, n, t: a.ne(x, 0),
    "le.Tensor": lambda x, n, t: a.le(x, n),
    "le.Scalar": lambda x, n, t: a.le(n, 0.5),
    "lt.Tensor": lambda x, n, t: a.lt(t, t.flip(1)),
    "lt.Scalar": lambda x, n, t: a.lt(n, -0.5),
    "ge.Tensor": lambda x, n, t: a.ge(n, x),
    "ge.Scalar": lambda x, n, t: a.ge(n, 1),
    "gt.Tensor": lambda x, n, t: a.gt(x, x.flip(1)),
    "gt.Scalar": lambda x, n, t: a.gt(n, 2.5),
    "bitwise_and.Tensor": lambda x, n, t: a.bitwise_and(n, n.flip(1)),
    "bitwise_and.Tensor of truth values": lambda x, n, t: a.bitwise_and(t, t.flip(1)),
    "bitwise_and.Scalar": lambda x, n, t: a.bitwise_and(n, 5),
    "bitwise_or.Tensor": lambda x, n, t: a.bitwise_or(n.int(), n.int().flip(1)),
    "bitwise_or.Scalar": lambda x, n, t: a.bitwise_or(n, 5),
    "bitwise_xor.Tensor": lambda x, n, t: a.bitwise_xor(n, n.flip(1)),
    "bitwise_xor.Scalar": lambda x, n, t: a.bitwise_xor(n, 5),
    "bitwise_not.default": lambda x, n, t: a.bitwise_not(n),
    "bitwise_not.default of truth values": lambda x, n, t: a.bitwise_not(t),
    "logical_and.default": lambda x, n, t: a.logical_and(n, t),
    "logical_or.default": lambda x, n, t: a.logical_or(n, t),
    "logical_xor.default": lambda x, n, t: a.logical_xor(x > 0, n),
    "logical_not.default": lambda x, n, t: a.logical_not(n),
    "where.self": lambda x, n, t: a.where(t, x, n.float()),
    "_to_copy.default": lambda x, n, t: a._to_copy(x * 9, dtype=torch.int32),
}

REDUCTIONS: dict[str, Call] = {
    "amax.default": lambda x, n, t: a.amax(x, [-1, 1], True),
    "amax.default of all": lambda x, n, t: a.amax(n),
    "amin.default": lambda x, n, t: a.amin(n, [-1]),
    "any.default": lambda x, n, t: a.any(t),
    "any.dim": lambda x, n, t: a.any(n, -2),
    "any.dims": lambda x, n, t: a.any(x > 2, [0, 2], True),
    "argmax.default": lambda x, n, t: a.argmax(x, -1, True),
    "argmax.default of all": lambda x, n, t: a.argmax(x),
    "argmin.default": lambda x, n, t: a.argmin(x, 1),
    "max.dim": lambda x, n, t: a.max(x, 1),
    "min.dim": lambda x, n, t: a.min(x, -1, True),
    "mean.default": lambda x, n, t: a.mean(x),
    "mean.dim": lambda x, n, t: a.mean(x, [-1], True),
    "prod.default": lambda x, n, t: a.prod(x.tanh() + 1),
    "prod.dim_int": lambda x, n, t: a.prod(n, -1, True),
    "prod.dim_int of truth values": lambda x, n, t: a.prod(t, 1),
    "sum.dim_IntList": lambda x, n, t: a.sum(t, [1], True),
    "sum.dim_IntList of all": lambda x, n, t: a.sum(n, []),
    "var.correction": lambda x, n, t: a.var(x, [-1], correction=0),
    "var.correction over the batch": lambda x, n, t: a.var(x, None, correction=1),
    "var.dim": lambda x, n, t: a.var.dim(x, [0, 1], False, True),
    "cumsum.default": lambda x, n, t: a.cumsum(n, -2),
    "cumsum.default of a number": lambda x, n, t: a.cumsum(x.sum(), 0),
    "topk.default": lambda x, n, t: a.topk(x, 3, -2, False),
    "sort.default": lambda x, n, t: a.sort(x, -1),
    "sort.default of equal elements": lambda x, n, t: a.sort(n, 1, True),
    "sort.default of the batch": lambda x, n, t: a.sort(x, 0),
    "_softmax.default": lambda x, n, t: a._softmax(x, 1, False),
    "_log_softmax.default": lambda x, n, t: a._log_softmax(x, -1, False),
    "_cdist_forward.default": lambda x, n, t: a._cdist_forward(x, x.flip(1), 2.0, None),
    "_cdist_forward.default of order 1": lambda x, n, t: a._cdist_forward(x, x.flip(1), 1.0, None),
    "_pdist_forward.default": lambda x, n, t: a._pdist_forward(a.select(x, 0, 0), 3.0),
}

SHAPES: dict[str, Call] = {
    "arange.start_step": lambda x, n, t: x + a.arange(8, 0, -1),
    "as_strided.default": lambda x, n, t: a.as_strided(x * 1, [x.shape[0], 3, 4], [48, 16, 2], 3),
    "cat.default": lambda x, n, t: a.cat([x, x], -2),
    "clone.default": lambda x, n, t: a.clone(x) + 1,
    "alias.default": lambda x, n, t: a.alias(x) + 1,
    "constant_pad_nd.default": lambda x, n, t: a.constant_pad_nd(n, [1, -2, 0, 3], 7),
    "constant_pad_nd.default by nothing": lambda x, n, t: a.constant_pad_nd(x, [0, 0]) * 2,
    "copy.default": lambda x, n, t: a.copy(x, n),
    "diagonal.default": lambda x, n, t: a.diagonal(x, 1, -1, 1),
    "diagonal.default from below": lambda x, n, t: a.diagonal(x, -2, 1, 2),
    "empty.memory_format": lambda x, n, t: a.full_like(a.empty([3]), 2.0) + a.sum(x),
    "empty_strided.default": lambda x, n, t: a.full_like(a.empty_strided([3], [1]), 2.0) + a.sum(x),
    "expand.default": lambda x, n, t: a.expand(a.unsqueeze(x, 1), [-1, 4, -1, -1]),
    "fill.Scalar": lambda x, n, t: a.fill(n, 3),
    "flip.default": lambda x, n, t: a.flip(x, [-1, 0]),
    "flip.default of nothing": lambda x, n, t: a.flip(x, []) + 1,
    "full.default": lambda x, n, t: x + a.full([8], 2.5),
    "full_like.default": lambda x, n, t: a.full_like(n, 2),
    "permute.default": lambda x, n, t: a.permute(x, [-1, 0, 1]),
    "repeat.default": lambda x, n, t: a.repeat(x, [2, 1, 1, 3]),
    "scalar_tensor.default": lambda x, n, t: x * a.scalar_tensor(2.5),
    "select.int": lambda x, n, t: a.select(x, -1, -2),
    "select_scatter.default": lambda x, n, t: a.select_scatter(x, a.select(x, 1, 0), -2, -1),
    "slice.Tensor": lambda x, n, t: a.slice(x, -1, 1, -1, 2),
    "slice_scatter.default": lambda x, n, t: a.slice_scatter(x, a.slice(x, 1, 0, 2), -2, 2, 4),
    "split_with_sizes.default": lambda x, n, t: tuple(a.split_with_sizes(x, [1, 2, 5], -1)),
    "squeeze.dim": lambda x, n, t: a.squeeze(a.unsqueeze(x, 1), 1) + 1,
    "squeeze.dim of more than one": lambda x, n, t: a.squeeze(x, 1) + 1,
    "squeeze.dims": lambda x, n, t: a.squeeze(a.unsqueeze(x, 1), [-3, 2]) + 1,
    "sym_numel.default": lambda x, n, t: x / x.numel(),
    "sym_size.int": lambda x, n, t: x / x.shape[0],
    "unsqueeze.default": lambda x, n, t: a.unsqueeze(x, -2),
    "view.default": lambda x, n, t: a.view(x, [-1, 4]),
    "embedding.default": lambda x, n, t: a.embedding(torch.arange(40.0).view(20, 2), n + 9),
}

PLACES: dict[str, Call] = {
    "gather.default": lambda x, n, t: a.gather(x, -1, n.abs() % 8),
    "gather.default of fewer": lambda x, n, t: a.gather(x, -2, (n.abs() % 6)[:, :2, :3]),
    "index.Tensor": lambda x, n, t: a.index(x, [None, torch.tensor([0, -1])]),
    "index.Tensor of two": lambda x, n, t: a.index(x, [None, torch.tensor([[0], [2]]), torch.tensor([1, 3, -1])]),
    "index.Tensor with a gap": lambda x, n, t: a.index(x, [torch.tensor([1, 0]), None, torch.tensor([3, 2])]),
    "index_put.default": lambda x, n, t: a.index_put(x, [None, torch.tensor([0, 2])], torch.ones(2, 8)),
    "index_put.default added": lambda x, n, t: a.index_put(
        x, [torch.tensor([0, 0]), None, torch.tensor([1, 1])], torch.tensor(2.0), True
    ),
    "index_put.default by a mask": lambda x, n, t: a.index_put(x, [t], torch.tensor(2.0)),
    "index_select.default": lambda x, n, t: a.index_select(x, -1, torch.tensor([3, 0])),
    "masked_scatter.default": lambda x, n, t: a.masked_scatter(x, t, x.flip(1)),
    "scatter.value": lambda x, n, t: a.scatter(x, -1, n.abs()[..., :1] % 8, 5.0),
    "scatter.src": lambda x, n, t: a.scatter(x, 1, (n.abs() % 6)[:, :1, :4], x + 1),
    "scatter_add.default": lambda x, n, t: a.scatter_add(x, -1, n.abs() % 8, x),
    "scatter_add.default of fewer": lambda x, n, t: a.scatter_add(x, 1, (n.abs() % 6)[:, :2, :3], x),
    **{
        f"scatter_reduce.two {how}{' alone' * (not own)}": lambda x, n, t, how=how, own=own: a.scatter_reduce(
            x, -1, n.abs() % 4, x.flip(1), how, include_self=own
        )
        for how in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)
    },
    "_embedding_bag.default": lambda x, n, t: torch.nn.functional.embedding_bag(
        n.abs().flatten(1), torch.arange(40.0).view(20, 2), mode="mean", padding_idx=1
    ),
    "_embedding_bag.default sum": lambda x, n, t: torch.nn.functional.embedding_bag(
        n.abs().flatten(), torch.arange(40.0).view(20, 2), torch.tensor([0, 0, 7]), mode="sum"
    ),
    "_embedding_bag.default max": lambda x, n, t: torch.nn.functional.embedding_bag(
        n.abs().flatten(), torch.arange(40.0).view(20, 2), torch.tensor([0, 0, 7]), mode="max"
    ),
}

_weight = torch.linspace(-1, 1, 2 * 4 * 9).view(2, 4, 3, 3)
_mean = torch.tensor([0.1, -0.2])
LAYERS: dict[str, Call] = {
    "addmm.default": lambda x, n, t: a.addmm(torch.ones(8), a.view(x, [-1, 8]), torch.ones(8, 8), beta=0.5, alpha=2),
    "bmm.default": lambda x, n, t: a.bmm(x, a.permute(x, [0, 2, 1])),
    "mm.default": lambda x, n, t: a.mm(a.view(x, [-1, 8]), torch.ones(8, 3)),
    "convolution.default": lambda x, n, t: a.convolution(
        _rows(x), _weight.transpose(0, 1), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    ),
    "convolution.default transposed": lambda x, n, t: a.convolution(
        _rows(x), _weight, torch.ones(4), [2, 2], [1, 1], [1, 1], True, [1, 1], 1
    ),
    "native_layer_norm.default": lambda x, n, t: a.native_layer_norm(x, [6, 8], None, None, 1e-5)[0],
    "native_group_norm.default": lambda x, n, t: a.native_group_norm(
        x, torch.arange(6.0), None, x.shape[0], 6, 8, 3, 1e-5
    )[0],
    "_native_batch_norm_legit_no_training.default": lambda x, n, t: a._native_batch_norm_legit_no_training(
        _rows(x), _mean, None, _mean, _mean.exp(), 0.1, 1e-5
    )[0],
    "adaptive_avg_pool1d.default": lambda x, n, t: a.adaptive_avg_pool1d(x, [3]),
    "_adaptive_avg_pool2d.default": lambda x, n, t: a._adaptive_avg_pool2d(_rows(x), [3, 4]),
    "_adaptive_avg_pool2d.default uneven": lambda x, n, t: a._adaptive_avg_pool2d(_rows(x), [2, 5]),
    "_adaptive_avg_pool3d.default": lambda x, n, t: a._adaptive_avg_pool3d(a.view(x, [-1, 1, 2, 3, 8]), [2, 1, 3]),
    "avg_pool1d.default": lambda x, n, t: a.avg_pool1d(x, [3], [2], [1], True, False),
    "avg_pool2d.default": lambda x, n, t: a.avg_pool2d(_rows(x), [2], [1], [1], False, True, 3),
    "avg_pool3d.default": lambda x, n, t: a.avg_pool3d(a.view(x, [-1, 1, 2, 3, 8]), [2, 2, 2]),
    "max_pool2d_with_indices.default": lambda x, n, t: a.max_pool2d_with_indices(_rows(x), [2, 3], [], [1, 1]),
    "max_pool3d_with_indices.default": lambda x, n, t: a.max_pool3d_with_indices(
        a.view(x, [-1, 2, 2, 3, 4]), [2, 2, 2], [1]
    ),
    "col2im.default": lambda x, n, t: a.col2im(a.view(x, [-1, 4, 12]), [5, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "grid_sampler_2d.default": lambda x, n, t: a.grid_sampler_2d(
        _rows(x), a.view(x, [-1, 3, 8, 2]).tanh(), 0, 0, False
    ),
    "grid_sampler_2d.default nearest, at the border": lambda x, n, t: a.grid_sampler_2d(
        _rows(x), a.view(x, [-1, 3, 8, 2]), 1, 1, False
    ),
    "reflection_pad1d.default": lambda x, n, t: a.reflection_pad1d(x, [2, 1]),
    "reflection_pad2d.default": lambda x, n, t: a.reflection_pad2d(_rows(x), [2, 1, 0, 1]),
    "reflection_pad3d.default": lambda x, n, t: a.reflection_pad3d(a.view(x, [-1, 1, 2, 3, 8]), [1, 1, 0, 1, 1, 0]),
    "replication_pad2d.default": lambda x, n, t: a.replication_pad2d(_rows(x), [2, 1, 0, 1]),
    "replication_pad3d.default": lambda x, n, t: a.replication_pad3d(a.view(x, [-1, 1, 2, 3, 8]), [1, 1, 0, 1, 1, 0]),
    "upsample_bilinear2d.vec": lambda x, n, t: a.upsample_bilinear2d(_rows(x), [5, 7], True, None),
    "upsample_nearest2d.vec": lambda x, n, t: a.upsample_nearest2d(_rows(x), None, [2.0, 2.0]),
    "_fft_r2c.default": lambda x, n, t: torch.view_as_real(a._fft_r2c(x, [1, 2], 1, True)),
    "_fft_c2r.default": lambda x, n, t: a._fft_c2r(a._fft_r2c(x, [2], 0, True), [2], 2, 8),
    "_fft_c2r.default of an odd number": lambda x, n, t: a._fft_c2r(a._fft_r2c(x[..., :7], [2], 0, True), [2], 0, 7),
}

DECOMPOSED: dict[str, Call] = {
    "_native_batch_norm_legit.default": lambda x, n, t: a._native_batch_norm_legit(
        _rows(x), None, None, _mean.clone(), _mean.exp(), False, 0.1, 1e-5
    )[0],
    "_native_batch_norm_legit.no_stats": lambda x, n, t: a._native_batch_norm_legit.no_stats(
        _rows(x), _mean, _mean, True, 0.1, 1e-5
    )[0],
    "native_dropout.default of inference": lambda x, n, t: a.native_dropout(x, 0.5, False)[0] * 2,
}

FAMILIES: Mapping[str, Mapping[str, Call]] = {
    "functions": FUNCTIONS,
    "pairs": PAIRS,
    "reductions": REDUCTIONS,
    "shapes": SHAPES,
    "places": PLACES,
    "layers": LAYERS,
    "decomposed": DECOMPOSED,
}


class Calls(nn.Module):
    """The results of calls by name, those of several one by one, beside that of a linear."""

    def __init__(self, calls: Mapping[str, Call]):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), calls

    def forward(self, x: Tensor, n: Tensor, t: Tensor) -> dict[str, Tensor]:
        made = {"linear": self.linear(x)}
        for name, call in self.calls.items():
            result = call(x, n, t)
            made |= {name: result} if isinstance(result, Tensor) else {f"{name}:{i}": r for i, r in enumerate(result)}
        return made


def inputs(batch: int) -> dict[str, Tensor]:
    """What the calls are given, for a batch."""
    random = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn(batch, 6, 8, generator=random), "n": torch.randint(-9, 10, (batch, 6, 8), generator=random),
        "t": torch.rand(batch, 6, 8, generator=random) > 0.5,
    }  # fmt: skip


def core_operators() -> list[torch._ops.OpOverload]:
    """The functions that PyTorch tags as core ATen."""
    names = (name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    parts = (name.partition(".") for name in sorted(set(names)))
    overloads = (getattr(getattr(a, packet), overload or "default") for packet, _, overload in parts)
    return [o for o in overloads if torch.Tag.core in o.tags and not o._schema.is_mutable]


def same(got: Tensor, want: Tensor) -> bool:
    """Whether a file computes what PyTorch computes, to some roundings of the largest element."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    scale = max(1.0, float(want.nan_to_num(0, 0, 0).abs().max()))
    return torch.allclose(got, want, rtol=1e-5, atol=2e-6 * scale, equal_nan=True)
