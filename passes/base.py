"""The contract of a pass, and the pipeline that runs passes in order.

A pass is a frozen dataclass of options. `requires` refuses a graph it cannot work on, `call` changes the graph and says
what it did and which sites it left alone, `ensures` checks what it promised.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ..errors import PassError, QExportError
from ..graph.edit import is_call
from ..graph.sites import linears
from ..graph.views import Item, results_of
from ..quant.formats import ActivationFormat


@dataclass(frozen=True)
class SiteRecord:
    """What a pass did at a site, or why it did nothing there.

    Attributes:
        site: name of the value or linear.
        what: one line for the user.
        data: numbers for the report.
    """

    site: str
    what: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PassResult:
    """The account of one pass over one graph."""

    changed: list[SiteRecord] = field(default_factory=list)
    skipped: list[SiteRecord] = field(default_factory=list)


def log_sites(place: str, step: str, changed: Sequence[SiteRecord], skipped: Sequence[SiteRecord]) -> None:
    """Log what a pass did: how many sites it changed, which it left alone and why; what it did at each is a detail.

    Args:
        place: the block, or what else the pass went through.
        step: its name, under which it logs.
    """
    logger = logging.getLogger(f"{__package__}.{step}")
    if changed:
        logger.info("%s: %d sites changed", place, len(changed))
    for site in changed:
        logger.debug("%s: %s: %s", place, site.site, site.what)
    for site in skipped:
        logger.info("%s: %s left alone: %s", place, site.site, site.what)


Statistics = dict[Node, Any]


@dataclass(frozen=True)
class Batch:
    """One calibration batch of a block.

    Attributes:
        inputs: of the block, as the quantized blocks before it make them.
        target: what the float model hands on there, [batch, ..., features]; None where it is not known.
        output: the place of that value among the block's outputs.
        mask: real tokens, bool, shaped like the leading dimensions of the target; None where all are.
    """

    inputs: tuple[torch.Tensor, ...]
    target: torch.Tensor | None = None
    output: int = 0
    mask: torch.Tensor | None = None


@dataclass
class PassState:
    """What passes leave for those after them in the same block.

    Attributes:
        keeps_weights: whether a pass of the pipeline reads float weights after they are rounded.
        weights: by linear name, its float weight [N, K] before it was rounded, in the basis of its present input.
        folded: by linear name, a factor [K] that its columns carry already and that rounding is not to see.
        formats: by value, the activation format decided for it, in place of the scheme's.
        input_scales: by linear name, the scale of its static input where that is given and not to be calibrated.
        row_scales: by value, how its dynamic scale follows from a token, where it is not the largest magnitude.
    """

    keeps_weights: bool = False
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    folded: dict[str, torch.Tensor] = field(default_factory=dict)
    formats: dict[Node, ActivationFormat] = field(default_factory=dict)
    input_scales: dict[str, float] = field(default_factory=dict)
    row_scales: dict[Node, "RowScale"] = field(default_factory=dict)

    def keep_weight(self, linear: str, weight: torch.Tensor) -> None:
        """Remember a weight that is about to change, if anyone will ask; the first one given counts."""
        if self.keeps_weights:
            self.weights.setdefault(linear, weight)


@dataclass(frozen=True)
class RowScale:
    """CrossQuant's own row scale: max over channels of |x_j * factors_j|, to the power of alpha."""

    factors: torch.Tensor
    alpha: float


Earlier = Callable[[str], torch.Tensor]


def _nothing_earlier(name: str) -> torch.Tensor:
    raise PassError(f"no block before this one has made {name}")


@dataclass
class Context:
    """What a pass may use besides the graph.

    Attributes:
        statistics: for each value the pass asked for, the object it asked for, filled.
        sample: inputs of the block for one calibration batch; empty when there is no calibration.
        batches: all calibration batches; empty when there is no calibration.
        handover: what the passes before it left for it.
        earlier: a tensor of a block that is finished, by name.
    """

    statistics: Statistics = field(default_factory=dict)
    sample: tuple[torch.Tensor, ...] = ()
    batches: Sequence[Batch] = ()
    handover: PassState = field(default_factory=PassState)
    earlier: Earlier = _nothing_earlier


class GraphPass(ABC):
    """Base of every pass. Subclasses are frozen dataclasses of options."""

    preserves_output: ClassVar[bool] = False
    # It rounds, or changes nothing: every value stays the float model's but for errors. One that keeps the function may
    # still move factors between layers. A validation compares layers by this, see `validation.account`.
    preserves_values: ClassVar[bool] = False
    reads_float_weights: ClassVar[bool] = False  # of linears that passes before it have rounded

    @property
    def name(self) -> str:
        return type(self).__name__

    def applies_to(self, module: GraphModule) -> bool:
        """Whether the pass has anything to look at in a block; blocks where no pass has are not even loaded."""
        return bool(linears(module.graph))

    def requires(self, module: GraphModule) -> None:  # noqa: B027  most passes work on any graph
        """Raise PassError where the graph is not one the pass can work on."""

    def statistics(self, module: GraphModule) -> dict[Node, Callable[[], Any]]:
        """For each value whose rows the pass wants to see, a factory of the object with `update(x)` that sees them."""
        return {}

    def wanted(self, module: GraphModule, handover: PassState) -> dict[Node, Callable[[], Any]]:
        """The same for a pass whose questions depend on what passes before it left."""
        return self.statistics(module)

    @abstractmethod
    def call(self, module: GraphModule, context: Context) -> PassResult:
        """Change the graph in place."""

    def ensures(self, before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> None:
        """Check outputs on the sample. A pass that keeps the float function may move them by rounding only.

        Raises:
            PassError: an output moved by more than 1e-4 of its largest element.
        """
        if not self.preserves_output:
            return
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            if not old.is_floating_point():
                old, new = old.double(), new.double()
            moved = ((new - old).abs().max() / old.abs().max().clamp_min(1e-12)).item() if old.numel() else 0.0
            if not moved < 1e-4:
                raise PassError(f"output {index} moved by {moved:.1e} of its range, though the pass keeps the function")


Collect = Callable[[GraphModule, dict[Node, Callable[[], Any]]], Statistics]


@dataclass(frozen=True)
class Pipeline:
    """Passes run one after another, each with statistics taken after the previous one."""

    passes: Sequence[GraphPass]

    def run(
        self,
        module: GraphModule,
        collect: Collect,
        sample: tuple[torch.Tensor, ...] = (),
        batches: Sequence[Batch] = (),
        earlier: Earlier = _nothing_earlier,
    ) -> dict[str, PassResult]:
        """Run all passes on a graph in place.

        Args:
            module: a block with its weights loaded.
            collect: runs calibration data through the module and fills the statistics a pass asks for.
            sample: inputs of the module on which promises are checked.
            batches: all calibration batches of the module.
            earlier: reads a tensor of a block that is finished.

        Raises:
            PassError: names the pass that failed and those that ran before it. Expected errors of other kinds keep
                their kind and get the pass as their place.
        """
        results: dict[str, PassResult] = {}
        handover = PassState(keeps_weights=any(step.reads_float_weights for step in self.passes))
        for step in self.passes:
            try:
                step.requires(module)
                before = _visible(module, sample) if sample and step.preserves_output else ()
                wanted = step.wanted(module, handover)
                statistics = collect(module, wanted) if wanted else {}
                result = step.call(module, Context(statistics, sample, batches, handover, earlier))
                if before:
                    step.ensures(before, _visible(module, sample))
            except PassError as error:
                done = ", ".join(results) or "none"
                raise PassError(
                    f"{error.message} (passes before it: {done})", place=f"pass {step.name}", remedy=error.remedy
                ) from error
            except QExportError as error:
                error.place = error.place or f"pass {step.name}"
                raise
            results[step.name] = result
        return results


def _visible(module: GraphModule, sample: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A block's outputs without its cache: keys and values may change basis, only the same block reads them again."""
    items = [Item.match(result) for result in results_of(module.graph)]
    cached = [item is not None and is_call(item.source, torch.ops.qexport.cached_attention.default) for item in items]
    values = zip(module(*sample), cached, strict=True)
    return tuple(value for value, hidden in values if isinstance(value, torch.Tensor) and not hidden)
