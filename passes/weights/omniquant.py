"""OmniQuant (arXiv 2308.13137): where ranges are clipped, and factors from activations to weights, trained by block.

Learned clipping: the range of a group is [sigmoid(b) min(W), sigmoid(a) max(W)], with a and b trained. They begin at 4
as in the paper, and the sigmoid is divided by its value there, so that training begins at the nearest codes.

Learned equivalent transformation: x W = (x / s) (s W), with s trained at every value whose producer, a norm or the rows
of a linear, takes the division for nothing. Rows that are divided keep their codes: their scales are divided. The
paper's shift of activations is left out: linears without a bias cannot take it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph.edit import get_tensor
from ...graph.narrow import widened
from ...graph.sites import FoldSite, Linear, fold_sites, linear_at
from ...plan.linear_plan import LinearPlan
from ...quant.affine import grouped
from ...quant.formats import PER_TENSOR, IntegerFormat
from ...quant.learned_codes import grid_of, range_of
from ...recipe.registry import method
from ..base import GraphPass, PassState
from ..equalization.equalize import fold, on_consumers
from .block_training import GridWeight, LatentCodes, Shared, TrainedCodes, Update, adam
from .training import TrainedBlocks

_BEGIN = 4.0
_FULL = 1 / (1 + math.exp(-_BEGIN))


@method("weights", "omniquant")
class OmniQuantSection(TrainedBlocks):
    """Clipping and equalizing factors trained for each block (OmniQuant); codes are the nearest ones after that.

    Attributes:
        rate: of Adam, for the clipping; the paper's is 0.005 for some 2500 steps.
        equalize: train factors from activations to weights too, beginning at 1, or at what an equalization before this
            has left.
        factor_rate: of Adam, for their logarithms.
    """

    rate: float = Field(0.1, gt=0, le=1)
    equalize: bool = True
    factor_rate: float = Field(0.02, gt=0, le=1)
    kl_left: ClassVar[float] = 0.5

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        options = (self.rate, self.equalize, self.factor_rate)
        return [OmniQuant(plan, self.steps, self.batches, self.token_norm_power, *options)]


class _Clipped(GridWeight):
    """The range of each group of a weight, whose columns may carry a factor that its input is divided by."""

    def __init__(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> None:
        super().__init__(w, fmt, factor)
        self._w = w
        self._site: _Site | None = None
        low, _ = range_of(w, fmt)
        self.low, self.high = (torch.full_like(low, _BEGIN).requires_grad_() for _ in range(2))

    @property
    def parameters(self) -> list[Tensor]:
        return [self.low, self.high]

    def read_by(self, site: "_Site") -> None:
        """Let the columns carry the factors of a site."""
        self._site = site

    def settle(self, w: Tensor) -> None:
        """Take the weight that carries all factors itself."""
        self._w, self._site, self.groups = w, None, grouped(w, self.format)

    def grid(self) -> tuple[Tensor, Tensor, Tensor | None]:
        w = self._w if self._site is None else self._w * self._site.columns()
        low, high = range_of(w, self.format)
        low, high = low * (self.low.sigmoid() / _FULL), high * (self.high.sigmoid() / _FULL)
        scale, zero = grid_of(low, high, self.format)
        return grouped(w, self.format) / scale[..., None], scale, zero

    def rounded(self) -> Tensor:
        values = super().rounded()
        return values if self._site is None else values / self._site.columns()


class _Site:
    """The factors of a value that linears read."""

    def __init__(self, place: FoldSite, device: torch.device) -> None:
        self.place = place
        first = place.consumers[0]
        size = first.shape[1] if place.repeat is None else place.repeat[0] * place.repeat[2]
        self.logarithms = torch.zeros(size, device=device).requires_grad_()

    def columns(self) -> Tensor:
        """[K] of the linears."""
        return on_consumers(self.place, self.logarithms.exp())


class _Sites(Shared):
    """All factors of a block."""

    def __init__(self, sites: Sequence[_Site], latents: Mapping[str, _Clipped]) -> None:
        self._sites, self._latents = sites, latents
        self._by_value = {linear.input: site for site in sites for linear in site.place.consumers}

    @property
    def parameters(self) -> list[Tensor]:
        return [site.logarithms for site in self._sites]

    def input_factor(self, value: Node) -> Tensor | None:
        site = self._by_value.get(value)
        return None if site is None else site.columns()

    def settle(self, module: GraphModule) -> None:
        for site in self._sites:
            fold(module, site.place, site.logarithms.detach().exp())
        if self._sites:  # else weights are as they were, with factors that rounding is not to see
            for name, latent in self._latents.items():
                latent.settle(widened(get_tensor(module, name)))


@dataclass(frozen=True)
class OmniQuant(TrainedCodes):
    """Clipped ranges, and factors folded into what produces the inputs.

    Attributes:
        rate: of Adam, for the clipping.
        equalize: train factors.
        factor_rate: of Adam, for their logarithms.
    """

    rate: float = 0.1
    equalize: bool = True
    factor_rate: float = 0.02
    preserves_values: ClassVar[bool] = False  # factors move

    def latent(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> _Clipped:
        return _Clipped(w, fmt, factor)

    def shared(
        self, module: GraphModule, found: Sequence[Linear], latents: Mapping[str, LatentCodes], handover: PassState
    ) -> Shared:
        clipped = {name: latent for name, latent in latents.items() if isinstance(latent, _Clipped)}
        # Another method's factors, which rounding is not to see, leave no room for these.
        free = self.equalize and not handover.folded and not handover.row_scales
        places = [site for site in fold_sites(module.graph) if self._takes(site, clipped)] if free else []
        sites = [_Site(place, get_tensor(module, place.consumers[0].weight).device) for place in places]
        for site in sites:
            for name in {linear.weight for linear in site.place.consumers}.intersection(clipped):
                clipped[name].read_by(site)
        return _Sites(sites, clipped)

    def updates(self, latents: Sequence[LatentCodes], shared: Shared) -> Update:
        clipping = [tensor for latent in latents for tensor in latent.parameters]
        return adam([(clipping, self.rate), (shared.parameters, self.factor_rate)])

    def _takes(self, site: FoldSite, latents: Mapping[str, LatentCodes]) -> bool:
        """Whether factors cost nothing at a site and leave the codes of rows that are divided as they are."""
        if site.kind == "explicit" or not any(linear.weight in latents for linear in site.consumers):
            return False
        producer = None if site.producer is None else linear_at(site.producer)
        decided = None if producer is None else self.plan.get(producer.name)
        return decided is None or decided.scheme is None or decided.scheme.weight.group_size != PER_TENSOR
