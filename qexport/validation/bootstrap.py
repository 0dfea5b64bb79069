"""Standard errors and a paired test, with windows of text as blocks: tokens of one window depend on each other."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_DRAWS = 2000
_SEED = 0
_EXACT_UP_TO = 14  # windows, whose signs have 16,384 combinations


def standard_error(windows: Tensor, statistic: Callable[[Tensor], Tensor]) -> float | None:
    """The standard error of a statistic of means over windows, by drawing windows with replacement; seeded.

    Args:
        windows: float64 [n, columns], means over the tokens of each window, which have equally many.
        statistic: from means [draws, columns] to [draws].

    Returns:
        None for fewer than two windows, and where there are NaN or Inf.
    """
    n = len(windows)
    if n < 2 or not bool(torch.isfinite(windows).all()):
        return None
    picked = torch.randint(n, (_DRAWS, n), generator=torch.Generator().manual_seed(_SEED))
    drawn = statistic(windows[picked].mean(1))
    # A sample's own spread is too small by this much, which counts where windows are few.
    return float(drawn.std(correction=0) * math.sqrt(n / (n - 1)))


def sign_flip_p(differences: Tensor) -> float:
    """How likely a mean at least this far from 0 is if each window's difference could as well have the other sign.

    Two-sided; exact up to 14 windows, else over 20,000 seeded draws.

    Args:
        differences: float64 [n], one a window.
    """
    n = len(differences)
    if n <= _EXACT_UP_TO:
        signs = 1.0 - 2.0 * ((torch.arange(2**n)[:, None] >> torch.arange(n)) & 1)
    else:
        draws = torch.randint(2, (10 * _DRAWS, n), generator=torch.Generator().manual_seed(_SEED))
        signs = torch.cat([torch.ones(1, n), 1.0 - 2.0 * draws])  # what was found is one of them
    means = (signs.double() @ differences).abs()
    return float((means >= differences.sum().abs() * (1 - 1e-12)).double().mean())
