"""How far a captured graph is from a witness, and how far rounding explains."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReaderAgreement:
    """What became of the comparison of the float graph with a witness that reads the model itself.

    Attributes:
        witness: its name; empty where there was none.
        compared: what took part: "the whole model", or which layers; on what it was run.
        difference: the largest one of an output, of the spread of that output; null where nothing was compared.
        bound: that rounding explains; null where nothing was compared.
        weights: how many tensors were compared element by element; all were equal.
        why_not: why nothing was compared; empty where it was.
    """

    witness: str = ""
    compared: str = ""
    difference: float | None = None
    bound: float | None = None
    weights: int = 0
    why_not: str = ""

    def short(self) -> str:
        """Who, and how far it is off, for a table."""
        if self.why_not:
            return f"nobody: {self.why_not}"
        return f"{self.witness}: equal up to {self.difference:.0e} of the spread"

    def sentence(self) -> str:
        """All of it, for people."""
        if self.why_not:
            return f"the float graph was compared with no other reading of the model: {self.why_not}"
        exact = f"; {self.weights} weights are equal" if self.weights else ""
        return (
            f"the float graph agrees with {self.witness} up to {self.difference:.1e} of the outputs' spread (rounding "
            f"explains {self.bound:.0e}), on {self.compared}{exact}"
        )


def together(found: Mapping[str, ReaderAgreement]) -> ReaderAgreement:
    """The comparison of a model in parts, by their names: the larger difference, of what bounds that."""
    unknown = [f"{name}: {part.why_not}" for name, part in found.items() if part.why_not]
    compared = [part for part in found.values() if not part.why_not and part.difference is not None]
    farthest = max(compared, key=lambda part: part.difference or 0.0, default=ReaderAgreement())
    return ReaderAgreement(
        farthest.witness, "; ".join(f"{name}: {part.compared}" for name, part in found.items() if part.compared),
        farthest.difference, farthest.bound, sum(part.weights for part in found.values()), "; ".join(unknown),
    )  # fmt: skip


def row_errors(want: Tensor, got: Tensor) -> Tensor:
    """The root mean square difference of each row of features, of the spread of all rows; float64 [rows].

    The spread is the deviation of features from the mean of their row (logits mean the same with any number added), or
    the magnitude where rows have few features. What is infinite or NaN in both, a masked logit, is equal.
    """
    want, got = (t.double().reshape(-1, t.shape[-1]) if t.dim() else t.double().reshape(1, 1) for t in (want, got))
    same = (want == got) | (want.isnan() & got.isnan())
    difference = torch.where(same, 0.0, got - want)
    known = torch.where(want.isfinite(), want, 0.0)
    few = want.shape[1] < _FEW
    spread = (known if few else known - known.mean(1, keepdim=True)).square().mean().sqrt()
    errors = difference.square().mean(1).sqrt()
    errors = torch.where(errors.isnan(), torch.inf, errors)
    return errors / spread.clamp_min(torch.finfo(torch.float32).tiny)


_FEW = 8  # features of which a mean says nothing


def difference(pairs: Iterable[tuple[Tensor, Tensor]], chooses: bool) -> float:
    """How far results are from what they should be: the farthest row, or the row in the middle where the model chooses.

    Args:
        pairs: what it should be, and what it is.
        chooses: it has decisions (a router's) which a difference of one bit turns: few tokens then differ by much.
    """
    worst = 0.0
    for want, got in pairs:
        if want.shape != got.shape:
            return float("inf")
        if want.numel():
            errors = row_errors(want, got)
            worst = max(worst, float(errors.median() if chooses else errors.max()))
    return worst


def explained(eps: float) -> float:
    """The difference that rounding explains, of the spread.

    Args:
        eps: of what computes, such as 2^-23 of float32.
    """
    return min(_ROUNDINGS * eps, _COARSEST)


# Two float32 kernels differ by about eps for every operation, at random: some 10 for a layer, so that 100 layers leave
# 30 eps, times what outliers do to it, whose rounding is large beside everything else in their row. Measured: 1 to 10
# eps on small random models of nearly every family, 80 at most; 60 on a trained one with 30 layers, with and without
# planted outliers. 8192 eps (1e-3 in float32, -60 dB) is a hundred times that. A mistake is far above: each of the 160
# linears that write to the residual stream of a model with 80 layers makes about 1 / sqrt(160), 8 % of it; a dropped
# scale, a file of another model or a permuted matrix replaces that by something unrelated. Not seen are mistakes that
# hardly change what the model computes, such as another epsilon of a norm whose inputs are large.
_ROUNDINGS = 8192
_COARSEST = 0.05  # of modules in float16 and bfloat16, whose graph is float32
