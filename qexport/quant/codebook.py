"""NF4 and FP4 weights (QLoRA, arXiv 2305.14314): blocks scaled to [-1, 1] and rounded to a table of 16 values."""

import torch
from torch import Tensor

from ..errors import NumericsError, RecipeError
from .affine import QuantizedWeight, row_chunks, row_slices
from .formats import WeightFormat

# Indexed by code, the values of bitsandbytes and of ONNX Runtime's MatMulBnb4. NF4: quantiles of a normal distribution,
# in rising order. FP4: a sign, two bits of exponent and one of mantissa, divided by 12, the largest of them.
_TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
}  # fmt: skip
_NESTED_BLOCK = 256
_TINY = torch.finfo(torch.float32).tiny


def table(codebook: str) -> Tensor:
    """The values of "nf4" or "fp4" in the order of their codes, float32 [16]."""
    return torch.tensor(_TABLES[codebook], dtype=torch.float32)


def quantize_codebook(w: Tensor, fmt: WeightFormat) -> QuantizedWeight:
    """Divide each block by its largest magnitude and take the nearest value of the table.

    A value in the middle between two goes to the lower one, as in bitsandbytes (in FP4 to the one nearer to zero). A
    block whose largest magnitude is zero or subnormal gets scale 1 and zeros. With double_quant the codes are still
    those of the exact scale, as in bitsandbytes; the scale that comes back is the rounded one.

    Args:
        w: float [N, K].
    Returns:
        codes uint8 [N, K], indices of `table`; scale float32 [N, K / group_size]; no zero point.
    Raises:
        NumericsError: w has NaN or Inf, or a range beyond float32.
        RecipeError: K is not a multiple of the group size.
    """
    n, k = w.shape
    groups = fmt.groups(k)
    if k != groups * fmt.group_size:
        raise RecipeError(f"{k} input features do not divide into groups of {fmt.group_size}")
    absmax = torch.empty(n, groups, dtype=torch.float32, device=w.device)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    for rows, chunk in row_chunks(w, fmt):
        blocks = chunk.float()
        absmax[rows] = torch.maximum(blocks.amax(-1), -blocks.amin(-1))
        if not bool(torch.isfinite(absmax[rows]).all()):
            raise NumericsError(
                "the weight has NaN or Inf, or a range beyond float32",
                remedy="Check the checkpoint, and load it in float32 if it was cast to float16",
            )
        steps = absmax[rows].masked_fill(absmax[rows] < _TINY, 1)
        codes[rows] = _nearest(blocks / steps[..., None], fmt.codebook).view(-1, k)
    scale = double_quantized(absmax) if fmt.double_quant else absmax
    return QuantizedWeight(codes, scale.masked_fill(absmax < _TINY, 1), None, fmt)


def dequantize(codes: Tensor, scale: Tensor, codebook: str, block_size: int) -> Tensor:
    """table[code] * scale.

    Args:
        codes: uint8 [N, K].
        scale: floating point [N, K / block_size].
        codebook: "nf4" or "fp4".
    Returns:
        [N, K] of scale's dtype.
    """
    n, k = codes.shape
    values = table(codebook).to(codes.device, scale.dtype)
    out = torch.empty(n, k // block_size, block_size, dtype=scale.dtype, device=codes.device)
    for rows in row_slices(n, k):
        picked = values.index_select(0, codes[rows].reshape(-1).int())
        torch.mul(picked.view(-1, k // block_size, block_size), scale[rows, :, None], out=out[rows])
    return out.view(n, k)


def double_quantized(absmax: Tensor) -> Tensor:
    """Scales as they come back from 8 bits each: their mean taken off, then the nearest value of the dynamic map.

    Runs of 256 scales, in the order of the flattened weight, share a float32 scale of their own; the last may be
    shorter. What comes back is at least the smallest normal float32: bitsandbytes can give a negative scale here.

    Args:
        absmax: float32 [N, G], not negative.
    Returns:
        float32 [N, G].
    """
    mean = absmax.double().mean().float()
    centred = (absmax - mean).reshape(-1)
    runs = torch.nn.functional.pad(centred, (0, -centred.numel() % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    steps = runs.abs().amax(-1, keepdim=True)
    steps = steps.masked_fill(steps < _TINY, 1)
    values = dynamic_map().to(absmax.device)
    codes = torch.bucketize(runs / steps, _middles(values))
    return (values[codes] * steps + mean).view(-1)[: absmax.numel()].view(absmax.shape).clamp_min(_TINY)


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map (arXiv 2110.02861), float32 [256], rising.

    The decade below 10^-e, e = 0 .. 6, has 2^(6-e) values of each sign, the middles of as many equal parts of [0.1, 1]
    times 10^-e; the two codes left over are 0 and 1.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1, dtype=torch.float32)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    values = torch.cat(positive)
    return torch.cat([-values, values, values.new_tensor([0, 1])]).sort().values


def _nearest(x: Tensor, codebook: str) -> Tensor:
    """Codes of x, float32 in [-1, 1]."""
    values, x = table(codebook).to(x.device), x.contiguous()
    if codebook == "nf4":
        return torch.bucketize(x, _middles(values), out_int32=True).to(torch.uint8)
    # By magnitude, so that ties are symmetric; the upper half of the codes has the sign. Zero is always code 0.
    ordered, order = values[:8].sort()
    codes = order.to(torch.uint8)[torch.bucketize(x.abs(), _middles(ordered), out_int32=True)]
    return torch.where((x < 0) & (codes > 0), codes + 8, codes)


def _middles(ordered: Tensor) -> Tensor:
    """The largest float32 numbers not above the middles: a float32 number above one of them is above the other too."""
    exact = (ordered[1:].double() + ordered[:-1].double()) / 2
    rounded = exact.float()
    return torch.where(rounded.double() > exact, rounded.nextafter(torch.tensor(-torch.inf)), rounded)
