"""Floats in a narrower dtype, or an error that names the tensor the dtype cannot hold."""

import math

import torch
from torch import Tensor

from ..errors import NumericsError

# What models write for "nothing may look here": the ends of a float dtype, where `torch.finfo` of the narrower one has
# ends of its own.
_ENDS = tuple(torch.finfo(dtype).max for dtype in (torch.float64, torch.float32, torch.bfloat16))
# A subnormal loses bits and a smaller number all of them. Rounding alone costs 2^-12 in float16 and 2^-9 in bfloat16.
_LOST = 2.0**-5
# Of the largest scale of a tensor: below it a scale's weights drown in what float16 leaves of those of the largest one.
_NEGLIGIBLE = 2.0**-11


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str, *, scale: bool = False) -> Tensor:
    """A tensor in `dtype`. Infinities stay; the ends of a wider dtype, and those of masks, become the ends of `dtype`.

    Args:
        tensor: anything; without floats, or in a `dtype` that is as wide, nothing is checked.
        name: of the tensor, for the error.
        scale: it is a scale of quantized numbers: each of its elements has a whole group of weights behind it.

    Raises:
        NumericsError: a finite element is beyond the largest number of `dtype`, or so many are below its smallest ones
            that more than 3 % of the tensor is lost (for a scale: of any element beside which the others do not count).
    """
    found = tensor.to(dtype)
    narrower = tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.dtype.itemsize
    if not narrower or not tensor.numel() or tensor.is_meta:
        return found
    largest = max(abs(end.item()) for end in tensor.aminmax())
    if largest > _largest(dtype):
        beyond = found.isinf() & tensor.isfinite()
        if beyond.any() and not _saturates(tensor, beyond):
            worst = tensor[beyond].abs().max().item()
            raise _does_not_fit(name, dtype, f"holds {worst:.4g}, and {_called(dtype)} ends at {_largest(dtype):g}")
        found = torch.where(beyond, found.clamp(-_largest(dtype), _largest(dtype)), found)
    if scale or largest < torch.finfo(dtype).tiny:
        _check_small(tensor, found, name, scale)
    return found


def narrowed_number(value: float, dtype: torch.dtype, what: str, *, counts: bool = False) -> float:
    """A number of a model's code as it is in a tensor of `dtype`: beyond the range, the end of `dtype`.

    Args:
        what: where it stands, for the error.
        counts: values are added to it or multiplied by it; else it is put in their place, or bounds them, and the end
            of `dtype` does as well.

    Raises:
        NumericsError: it counts, and is finite and beyond the range of `dtype`.
    """
    if not dtype.is_floating_point or not math.isfinite(value) or abs(value) <= _largest(dtype):
        return value
    if counts and abs(value) not in _ENDS:
        raise _does_not_fit(what, dtype, f"computes with {value:.4g}, and {_called(dtype)} ends at {_largest(dtype):g}")
    return math.copysign(_largest(dtype), value)


def _saturates(tensor: Tensor, beyond: Tensor) -> bool:
    """Whether what is beyond the range is meant to be as far away as a number can be: ends of a dtype, or a mask."""
    values = tensor[beyond]
    if all(abs(value) in _ENDS for value in values.unique()[:4].tolist()):
        return True
    # What is added to scores: zeros, and one large negative number.
    return bool((values == values[0]).all()) and values[0].item() < 0 and not tensor[~beyond].any()


def _check_small(tensor: Tensor, found: Tensor, name: str, scale: bool) -> None:
    magnitude, lost = tensor.abs(), (found.to(tensor.dtype) - tensor).abs()
    if not scale:
        if lost.norm() > _LOST * magnitude.norm():
            raise _does_not_fit(name, found.dtype, f"holds nothing above {magnitude.max().item():.2g}")
        return
    bad = (lost > _LOST * magnitude) & (magnitude > _NEGLIGIBLE * magnitude.max())
    if bad.any():
        zeros = int((found[bad] == 0).sum())
        become = f", and {zeros} of them become zero" if zeros else ""
        raise _does_not_fit(name, found.dtype, f"holds scales down to {magnitude[bad].min().item():.2g}{become}")


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _does_not_fit(name: str, dtype: torch.dtype, why: str) -> NumericsError:
    remedy = "Take dtype bfloat16, which has the range of float32" if dtype == torch.float16 else "Check the checkpoint"
    return NumericsError(f"does not fit {_called(dtype)}: it {why}", place=name, remedy=remedy)
