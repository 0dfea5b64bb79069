"""Modules of one linear and one operator: every layer of torch.nn and the usual functions, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

S2, S3, S4, S5 = (2, 8), (2, 6, 8), (2, 3, 6, 8), (2, 3, 4, 6, 8)
CASES: dict[str, tuple[Callable, tuple[int, ...]]] = {}


class With(nn.Module):
    """A function of the input and a module."""

    def __init__(self, m, function):
        super().__init__()
        self.m, self.function = m, function

    def forward(self, x):
        return self.function(x, self.m)


class Behind(nn.Module):
    """A linear, and an operator behind it."""

    def __init__(self, operator):
        super().__init__()
        self.linear, self.operator = nn.Linear(8, 8), operator

    def forward(self, x):
        return self.operator(self.linear(x))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A module of the list, and its input."""
    torch.manual_seed(0)
    operator, shape = CASES[name]
    return Behind(operator).eval(), torch.randn(*shape)


def add(name, operator, shape=S3):
    CASES[name] = operator, shape


def each(shape=S3, **operators):
    for name, operator in operators.items():
        add(name, operator, shape)


for n in [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Identity",
    "Flatten",
    "Dropout",
    "Dropout1d",
    "AlphaDropout",
    "FeatureAlphaDropout",
]:
    k = getattr(nn, n)
    kw = {}
    if n in ("LogSoftmax", "Softmax", "Softmin"):
        kw = {"dim": -1}
    add(n, k(**kw), S4 if n in ("Softmax2d",) else S3)
add("Threshold", nn.Threshold(0.1, 2.0))
add("MultiheadAttention", With(nn.MultiheadAttention(8, 2, batch_first=True), lambda x, m: m(x, x, x)[0]))
add("MultiheadAttention weights", With(nn.MultiheadAttention(8, 2, batch_first=True), lambda x, m: m(x, x, x)))
add("LayerNorm", nn.LayerNorm(8))
add("LayerNorm 2", nn.LayerNorm((6, 8)))
add("RMSNorm", nn.RMSNorm(8))
add("GroupNorm", nn.GroupNorm(3, 6))
add("BatchNorm1d", nn.BatchNorm1d(6))
add("BatchNorm2d", nn.BatchNorm2d(3), S4)
add("BatchNorm3d", nn.BatchNorm3d(3), S5)
add("InstanceNorm1d", nn.InstanceNorm1d(6))
add("InstanceNorm2d", nn.InstanceNorm2d(3, affine=True), S4)
add("InstanceNorm3d", nn.InstanceNorm3d(3), S5)
add("LocalResponseNorm", nn.LocalResponseNorm(2), S4)
add("CrossMapLRN2d", nn.CrossMapLRN2d(2), S4)
for d, s in ((1, S3), (2, S4), (3, S5)):
    ch = s[1]
    add(f"Conv{d}d", getattr(nn, f"Conv{d}d")(ch, 4, 3, padding=1), s)
    add(f"ConvTranspose{d}d", getattr(nn, f"ConvTranspose{d}d")(ch, 4, 3, stride=2, padding=1, output_padding=1), s)
    add(f"MaxPool{d}d", getattr(nn, f"MaxPool{d}d")(2), s)
    add(f"MaxPool{d}d indices", getattr(nn, f"MaxPool{d}d")(2, return_indices=True), s)
    add(f"AvgPool{d}d", getattr(nn, f"AvgPool{d}d")(2), s)
    add(f"LPPool{d}d", getattr(nn, f"LPPool{d}d")(2, 2), s)
    add(f"AdaptiveAvgPool{d}d", getattr(nn, f"AdaptiveAvgPool{d}d")(3), s)
    add(f"AdaptiveMaxPool{d}d", getattr(nn, f"AdaptiveMaxPool{d}d")(2), s)
    for p in ("Reflection", "Replication", "Zero", "Constant", "Circular"):
        if p != "Constant":
            add(f"{p}Pad{d}d", getattr(nn, f"{p}Pad{d}d")(1), s)
        else:
            add(f"{p}Pad{d}d", getattr(nn, f"{p}Pad{d}d")(1, 2.5), s)
    add(
        f"AdaptiveAvgPool{d}d uneven", getattr(nn, f"AdaptiveAvgPool{d}d")(5), s[:-3] + (7, 7, 7)[:0] + s[-3:]
    ) if d == 1 else None
add("MaxUnpool1d", lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2))
add("MaxUnpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), S4)
add("FractionalMaxPool2d", nn.FractionalMaxPool2d(2, output_size=(3, 4)), S4)
add("PixelShuffle", nn.PixelShuffle(2), (2, 4, 6, 8))
add("PixelUnshuffle", nn.PixelUnshuffle(2), S4)
add("ChannelShuffle", nn.ChannelShuffle(2), (2, 4, 6, 8))
add("Upsample nearest", nn.Upsample(scale_factor=2), S4)
add("Upsample bilinear", nn.Upsample(scale_factor=2, mode="bilinear"), S4)
add("Upsample linear", nn.Upsample(scale_factor=2, mode="linear"), S3)
add("Upsample trilinear", nn.Upsample(scale_factor=2, mode="trilinear"), S5)
add("Upsample nearest1d", nn.Upsample(scale_factor=2), S3)
add("Upsample nearest3d", nn.Upsample(scale_factor=2), S5)
add("nearest-exact", lambda x: F.interpolate(x, size=(9, 5), mode="nearest-exact"), S4)
add("bicubic aa", lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True), S4)
add("bilinear aa", lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True), S4)
add("area", lambda x: F.interpolate(x, size=(3, 4), mode="area"), S4)
add("Unfold", nn.Unfold(3), S4)
add("Fold", lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 8), 3, padding=1), S4)
add("Unflatten", nn.Unflatten(1, (2, 3)))
add("Bilinear", With(nn.Bilinear(8, 8, 4), lambda x, m: m(x, x)))
add("CosineSimilarity", lambda x: F.cosine_similarity(x, x.flip(1), -1))
add("PairwiseDistance", lambda x: F.pairwise_distance(x, x.flip(1)))
add("Embedding", With(nn.Embedding(16, 8), lambda x, m: m(x.argmax(-1))))
add("EmbeddingBag", With(nn.EmbeddingBag(16, 8), lambda x, m: m(x.argmax(-1))))
add("RNN", With(nn.RNN(8, 4, batch_first=True), lambda x, m: m(x)[0]))
add("LSTM", With(nn.LSTM(8, 4, batch_first=True), lambda x, m: m(x)[0]))
add("GRU", With(nn.GRU(8, 4, batch_first=True), lambda x, m: m(x)[0]))
add("LSTM bi 2", With(nn.LSTM(8, 4, num_layers=2, bidirectional=True), lambda x, m: m(x)[0]))
add("RNNCell", With(nn.RNNCell(8, 4), lambda x, m: m(x)), S2)
add("LSTMCell", With(nn.LSTMCell(8, 4), lambda x, m: m(x)[0]), S2)
add("GRUCell", With(nn.GRUCell(8, 4), lambda x, m: m(x)), S2)
add("TransformerEncoderLayer", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
add("TransformerDecoderLayer", With(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), lambda x, m: m(x, x)))
add("Transformer", With(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), lambda x, m: m(x, x)))
add("MSELoss", lambda x: F.mse_loss(x, x.flip(1), reduction="none").mean(-1))
add("HuberLoss", lambda x: F.huber_loss(x, x.flip(1), reduction="none"))
add("CrossEntropy", lambda x: F.cross_entropy(x.flatten(0, 1), x.argmax(-1).flatten(), reduction="none"))
add("KLDiv", lambda x: F.kl_div(x.log_softmax(-1), x.flip(1).softmax(-1), reduction="none"))
add("SmoothL1", lambda x: F.smooth_l1_loss(x, x.flip(1), reduction="none"))

each(
    acos=lambda x: torch.acos(x.tanh()),
    acosh=lambda x: torch.acosh(1 + x * x),
    asin=lambda x: torch.asin(x.tanh()),
    asinh=torch.asinh,
    atan=torch.atan,
    atanh=lambda x: torch.atanh(x.tanh() * 0.9),
    cosh=torch.cosh,
    sinh=torch.sinh,
    tan=lambda x: torch.tan(x.tanh()),
    log2=lambda x: torch.log2(x * x + 1),
    log10=lambda x: torch.log10(x * x + 1),
    exp2=torch.exp2,
    sign=torch.sign,
    trunc=torch.trunc,
    frac=torch.frac,
    isnan=lambda x: torch.isnan(x.log()),
    isinf=lambda x: torch.isinf(1 / x.relu()),
    isfinite=lambda x: x.log().isfinite(),
    nan_to_num=lambda x: torch.nan_to_num(x.log()),
    erfc=torch.erfc,
    erfinv=lambda x: torch.erfinv(x.tanh() * 0.9),
    lgamma=lambda x: torch.lgamma(x.abs() + 1),
    digamma=lambda x: torch.digamma(x.abs() + 1),
    logit=lambda x: torch.logit(x.sigmoid()),
    sinc=torch.sinc,
    rad2deg=torch.rad2deg,
    signbit=torch.signbit,
    positive=torch.positive,
    hypot=lambda x: torch.hypot(x, x.flip(1)),
    atan2=lambda x: torch.atan2(x, x.flip(1)),
    remainder=lambda x: torch.remainder(x, 0.7),
    fmod=lambda x: torch.fmod(x, -0.7),
    floor_divide=lambda x: x // 0.7,
    div_trunc=lambda x: torch.div(x, 0.7, rounding_mode="trunc"),
    lerp=lambda x: torch.lerp(x, x.flip(1), 0.3),
    addcmul=lambda x: torch.addcmul(x, x, x, value=0.5),
    addcdiv=lambda x: torch.addcdiv(x, x, x.abs() + 1, value=0.5),
    logaddexp=lambda x: torch.logaddexp(x, x.flip(1)),
    copysign=lambda x: torch.copysign(x, x.flip(1)),
    heaviside=lambda x: torch.heaviside(x, torch.tensor(0.5)),
    xlogy=lambda x: torch.xlogy(x, x * x + 1),
    clip=lambda x: x.clip(-0.5, 0.5),
    rsub=lambda x: torch.rsub(x, 2, alpha=3),
    add_alpha=lambda x: torch.add(x, x.flip(1), alpha=2),
    polar=lambda x: torch.polar(x.abs(), x).abs(),
    i0=torch.i0,
)
each(
    std=lambda x: x.std(-1),
    var=lambda x: x.var(1, correction=0),
    var_mean=lambda x: torch.var_mean(x, -1),
    std_all=lambda x: x.std((1, 2)),
    any=lambda x: (x > 0).any(-1),
    all=lambda x: (x > -1).all(-1),
    prod=lambda x: x.prod(-1),
    logsumexp=lambda x: x.logsumexp(-1),
    norm=lambda x: x.norm(dim=-1),
    norm3=lambda x: torch.linalg.vector_norm(x, 3, -1),
    norminf=lambda x: torch.linalg.vector_norm(x, float("inf"), -1),
    normalize=lambda x: F.normalize(x, dim=-1),
    min=lambda x: x.min(-1),
    max=lambda x: x.max(1),
    median=lambda x: x.median(-1)[0],
    mode=lambda x: x.round().mode(-1)[0],
    kthvalue=lambda x: x.kthvalue(2, -1)[0],
    quantile=lambda x: x.quantile(0.4, -1),
    nanmean=lambda x: x.log().nanmean(-1),
    nansum=lambda x: x.log().nansum(-1),
    aminmax=lambda x: tuple(torch.aminmax(x, dim=-1)),
    count_nonzero=lambda x: x.relu().count_nonzero(-1),
    cumsum=lambda x: x.cumsum(-1),
    cumprod=lambda x: x.cumprod(-1),
    cummax=lambda x: x.cummax(-1)[0],
    logcumsumexp=lambda x: x.logcumsumexp(-1),
    cdist=lambda x: torch.cdist(x, x.flip(1)),
    dist_p1=lambda x: torch.cdist(x, x.flip(1), p=1),
    argmax=lambda x: x.argmax(-1),
    argmin=lambda x: x.argmin(1),
    trace=lambda x: (x @ x.mT).diagonal(dim1=-2, dim2=-1).sum(-1),
)
each(
    sort=lambda x: x.sort(-1),
    sort_desc=lambda x: x.sort(1, descending=True),
    argsort=lambda x: x.argsort(-1),
    topk=lambda x: x.topk(3, -1),
    tril=lambda x: x.tril(),
    triu=lambda x: x.triu(1),
    diag_embed=lambda x: torch.diag_embed(x),
    diagonal=lambda x: x.diagonal(dim1=1, dim2=2),
    flip=lambda x: x.flip(1, 2),
    fliplr=torch.fliplr,
    rot90=lambda x: x.rot90(1, (1, 2)),
    roll=lambda x: x.roll(2, 1),
    roll_flat=lambda x: x[0].roll(3),
    unfold=lambda x: x.unfold(1, 3, 2),
    take_along=lambda x: x.take_along_dim(x.argsort(-1), -1),
    scatter_add=lambda x: torch.zeros_like(x).scatter_add(-1, x.argsort(-1) % 4, x),
    scatter_reduce=lambda x: torch.zeros_like(x).scatter_reduce(-1, x.argsort(-1) % 4, x, "amax"),
    index_add=lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, :2]),
    index_copy=lambda x: x.index_copy(1, torch.tensor([0, 2]), x[:, :2]),
    index_fill=lambda x: x.index_fill(1, torch.tensor([0, 2]), 3.0),
    index_put=lambda x: x.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.tensor(5.0)),
    index_mid=lambda x: x[:, torch.tensor([0, 2]), torch.tensor([1, 3])],
    masked_scatter=lambda x: x.masked_scatter(x > 0, x.flip(1)),
    masked_fill=lambda x: x.masked_fill(x > 0, 1.0),
    one_hot=lambda x: F.one_hot(x.argmax(-1), 8),
    bucketize=lambda x: torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5])),
    searchsorted=lambda x: torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5]), x, right=True),
    where=lambda x: torch.where(x > 0, x, 0.0),
    isin=lambda x: torch.isin(x.argmax(-1), torch.tensor([1, 2])),
    repeat_interleave=lambda x: x.repeat_interleave(2, 1),
    tile=lambda x: x.tile(1, 2, 1),
    movedim=lambda x: x.movedim(1, 2),
    swapaxes=lambda x: x.swapaxes(1, 2),
    atleast3d=torch.atleast_3d,
    as_strided=lambda x: torch.as_strided(x[0], (3, 4), (8, 2)),
    tensor_split=lambda x: x.tensor_split(3, -1),
    hstack=lambda x: torch.hstack((x, x)),
    dstack=lambda x: torch.dstack((x, x)),
    kron=lambda x: torch.kron(x, torch.ones(1, 2, 2)),
    cartesian=lambda x: torch.cartesian_prod(x[0, 0], x[0, 1]),
    combinations=lambda x: torch.combinations(x[0, 0]),
    chunk=lambda x: x.chunk(3, 1),
    narrow=lambda x: x.narrow(1, 1, 3),
    nonzero_static=lambda x: (x > 0).float(),
    vander=lambda x: torch.vander(x[0, 0], 4),
    block_diag=lambda x: torch.block_diag(x[0], x[1]),
    unbind=lambda x: x.unbind(1),
    pad_circular=lambda x: F.pad(x, (1, 2), mode="circular"),
    pad_replicate=lambda x: F.pad(x, (1, 2), mode="replicate"),
    gather=lambda x: x.gather(-1, x.argsort(-1)[..., :2]),
)
each(
    einsum=lambda x: torch.einsum("bij,bkj->bik", x, x),
    einsum_outer=lambda x: torch.einsum("bij,bkl->bijkl", x, x),
    matmul=lambda x: x @ x.mT,
    bmm=lambda x: torch.bmm(x, x.mT),
    tensordot=lambda x: torch.tensordot(x, torch.ones(8, 3), 1),
    outer=lambda x: torch.outer(x[0, 0], x[0, 1]),
    inner=lambda x: torch.inner(x, x[0]),
    dot=lambda x: torch.dot(x[0, 0], x[0, 1]),
    mv=lambda x: torch.mv(x[0], x[0, 0]),
    addmv=lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0]),
    addbmm=lambda x: torch.addbmm(x[0, :, :6], x, x.mT),
    baddbmm=lambda x: torch.baddbmm(x[:, :, :6], x, x.mT, beta=0.5, alpha=2),
    cross=lambda x: torch.linalg.cross(x[..., :3], x[..., 3:6]),
    chain=lambda x: torch.linalg.multi_dot((x[0], x[0].T, x[0])),
    sdpa=lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    sdpa_causal=lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    matrix_power=lambda x: torch.linalg.matrix_power(x @ x.mT, 3),
    inverse=lambda x: torch.linalg.inv(x @ x.mT + torch.eye(6)),
    det=lambda x: torch.linalg.det(x[:, :3, :3]),
    rfft=lambda x: torch.fft.rfft(x).abs(),
    fft=lambda x: torch.fft.fft(x).real,
    irfft=lambda x: torch.fft.irfft(torch.fft.rfft(x)),
    rfft2=lambda x: torch.view_as_real(torch.fft.rfft2(x)),
    stft=lambda x: torch.stft(x.flatten(1), 16, 4, window=torch.hann_window(16), return_complex=True).abs(),
    istft=lambda x: torch.istft(
        torch.stft(x.flatten(1), 16, 4, window=torch.hann_window(16), return_complex=True),
        16,
        4,
        window=torch.hann_window(16),
    ),
    complex_mul=lambda x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
        * torch.view_as_complex(x.flip(1).unflatten(-1, (4, 2)).contiguous())
    ),
    bit_and=lambda x: x.argmax(-1) & 3,
    bit_xor=lambda x: x.argmax(-1) ^ 5,
    bit_not=lambda x: ~x.argmax(-1),
    shift=lambda x: x.argmax(-1) << 2,
    logical_xor=lambda x: torch.logical_xor(x > 0, x > 0.5),
    int_div=lambda x: (x * 9).long() // 4,
    int_mod=lambda x: (x * 9).long() % 4,
    int_abs=lambda x: (x * 9).int().abs(),
    int_sum=lambda x: (x * 9).long().sum(-1),
    int_pow=lambda x: (x * 9).long() ** 2,
    linspace=lambda x: x + torch.linspace(0, 1, 8),
    eye=lambda x: x @ torch.eye(8),
    arange_dyn=lambda x: x + torch.arange(x.shape[0])[:, None, None],
    new_zeros=lambda x: x + x.new_zeros(8),
    rsqrt=lambda x: (x.abs() + 1).rsqrt(),
    celu=lambda x: F.celu(x, 2.0),
    gumbel_like=lambda x: -(-(x.sigmoid()).log()).log(),
    pixel_norm=lambda x: x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt(),
    logdet=lambda x: x.exp().log(),
    glu=lambda x: F.glu(x, 1),
    histc=lambda x: torch.histc(x, 4, -1, 1),
    threshold=lambda x: F.threshold(x, 0.1, 5),
)
each(
    S4,
    grid_sample=lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    affine_grid=lambda x: F.affine_grid(x[:, 0, :2, :3], (x.shape[0], 3, 4, 5), align_corners=False),
    local=lambda x: F.local_response_norm(x, 2),
)
