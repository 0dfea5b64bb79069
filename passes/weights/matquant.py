"""MatQuant (arXiv 2502.06786): 8-bit codes whose upper 4 or 2 bits are good codes too, trained by block.

    codes = clamp(round(W / s + 2^(8 - r) V) + z),  slice of r bits = clamp(round(codes / 2^(8 - r)))

V in [-1/2, 1/2] and the range of each group are trained by the signs of gradients of the sum of the errors of the block
with 8 bits and with each slice; r is the smallest of these, so that V may move a weight to its other neighbour there.
`qexport slice` writes the slices. Rounded, not cut off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.fx import GraphModule

from ...graph.sites import Linear
from ...plan.linear_plan import LinearPlan
from ...quant.affine import ungrouped
from ...quant.formats import IntegerFormat
from ...quant.learned_codes import codes_through, slice_through
from ...recipe.registry import method
from ..base import GraphPass, PassState
from .autoround import AutoRound, Rounding
from .block_training import Goal, LatentCodes, RoundedBlock, Shared, added
from .training import TrainedBlocks

if TYPE_CHECKING:
    from ...recipe.recipe import Recipe


@method("weights", "matquant")
class MatQuantSection(TrainedBlocks):
    """8-bit codes whose upper bits are good codes too (MatQuant); `qexport slice` makes files of these.

    Attributes:
        slices: numbers of upper bits that are trained besides all 8.
    """

    slices: Annotated[tuple[Literal[4, 2], ...], Field(min_length=1, max_length=2)] = (4,)

    def check(self, recipe: "Recipe") -> None:
        grids = [scheme.weight for scheme in recipe.schemes]
        if not all(isinstance(grid, IntegerFormat) and grid.bits == 8 and grid.group_size > 0 for grid in grids):
            raise ValueError("matquant has 8-bit codes in groups, whose upper bits are sliced", "Use w8a16_g64")

    def training_passes(self, samples: int, batch_size: int) -> float:
        return (1 + len(self.slices)) * super().training_passes(samples, batch_size)

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        rate = 1 / self.steps
        return [MatQuant(plan, self.steps, self.batches, self.token_norm_power, rate, rate, slices=self.slices)]


class _Nested(Rounding):
    """Codes of 8 bits, of which a block sees all or some."""

    def __init__(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None, fewest: int) -> None:
        super().__init__(w, fmt, factor, reach=2 ** (fmt.bits - fewest))
        self.bits = fmt.bits  # that `rounded` shows

    def rounded(self) -> Tensor:
        if self.bits == self.format.bits:
            return super().rounded()
        steps, scale, zero = self.grid()
        values = slice_through(codes_through(steps, zero, self.format), zero, self.format, self.bits)
        return self.multiplied(ungrouped(values * scale[..., None], self.features))


class _NestedBlock(RoundedBlock):
    """A block whose error is the sum of those with all bits and with the upper ones."""

    nested: Sequence[_Nested] = ()
    shown: Sequence[int] = ()

    def _show(self, bits: int) -> None:
        for latent in self.nested:
            latent.bits = bits

    def error(self, goals: Sequence[Goal]) -> float:
        total = 0.0
        for bits in self.shown:
            self._show(bits)
            total += super().error(goals)
        return total

    def gradients(self, goals: Sequence[Goal]) -> tuple[float, list[Tensor | None]]:
        found: list[Tensor | None] = [None] * len(self.parameters)
        total = 0.0
        for bits in self.shown:
            self._show(bits)
            error, parts = super().gradients(goals)
            total, found = total + error, added(found, parts)
        return total, found


@dataclass(frozen=True)
class MatQuant(AutoRound):
    """Codes that are trained as whole numbers of 8 bits and as their upper bits at once.

    Attributes:
        slices: numbers of upper bits.
    """

    slices: tuple[int, ...] = (4,)

    def latent(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> LatentCodes:
        return _Nested(w, fmt, factor, min(self.slices))

    def block(
        self, module: GraphModule, found: Sequence[Linear], latents: Mapping[str, LatentCodes], handover: PassState,
        shared: Shared,
    ) -> RoundedBlock:  # fmt: skip
        made = _NestedBlock(module, found, latents, self.plan, handover, shared)
        made.nested = [latent for latent in latents.values() if isinstance(latent, _Nested)]
        made.shown = sorted({*self.slices, *(latent.format.bits for latent in made.nested)})
        return made
