"""ZQ-Global (ZeroQuant-V2, arXiv 2303.08302): all weights of a block trained together against the float block."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from ...graph.edit import get_tensor, set_tensor
from ...graph.narrow import widened
from ...graph.sites import Linear
from ...plan.linear_plan import LinearPlan
from ...quant.formats import IntegerFormat
from ...quant.straight_through import Descent, fake_quantize_weight, mean_step
from ...recipe.registry import method
from ..base import Context, GraphPass, PassResult, PassState, SiteRecord
from .block_training import Goal, LatentWeight, RoundedBlock, goals_of, trainable, unfactored
from .rounding import integer_format
from .rtn import RoundToNearest
from .training import TrainedWeights

# A learning rate is tried for a tenth of the steps, but not for fewer than rank rates as all steps do.
_TRIAL, _FEWEST = 10, 4


@method("weights", "zq_global")
class ZQGlobalSection(TrainedWeights):
    """Weights trained so that each block hands on what it did in float when they are rounded; then rounded to nearest.

    The norm of a token is that of its target.
    """

    def training_passes(self, samples: int, batch_size: int) -> float:
        trials = (1 + len(self.learning_rates) * (1 / _TRIAL)) * self.steps
        return 3 * trials * batch_size / samples + 2

    def passes(self, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
        trained = ZQGlobal(plan, self.learning_rates, self.steps, self.token_norm_power)
        return [trained, RoundToNearest(plan)]


@dataclass(frozen=True)
class ZQGlobal(GraphPass):
    """Changes float weights; rounding them to nearest comes after it.

    What is minimised is the squared error of what the block hands on, on the inputs that the quantized blocks before it
    make, against what the float model hands on there: the errors of those blocks are answered for too. On the way
    forward weights are rounded, and so are the inputs of linears that will be dynamic; static ones, whose scale follows
    from the trained weights, stay in float. One calibration batch makes one update, in order. Norms and biases are not
    trained.

    Attributes:
        plan: by linear name; linears without a scheme, or without a grid of integers, stay as they are.
        learning_rates: as shares of the mean step between codes; each is tried on the first batches, the best goes on.
        steps: updates after that; fewer when the error over the batches stops falling.
        token_norm_power: the error of a token is divided by the norm of its target to this power: a few tokens of huge
            norm (attention sinks) otherwise own the mean.
    """

    plan: Mapping[str, LinearPlan]
    learning_rates: Sequence[float] = (0.01, 0.03, 0.1)
    steps: int = 100
    token_norm_power: float = 0.75
    preserves_values: ClassVar[bool] = True

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        goals = goals_of(context, self.token_norm_power)
        found = trainable(module, self.plan, goals, result)
        if found:
            self._train(module, found, goals, context.handover, result)
        return result

    def _train(
        self, module: GraphModule, found: list[Linear], goals: list[Goal], handover: PassState, result: PassResult
    ) -> None:
        latents = {linear.weight: self._latent(module, linear, handover) for linear in found}
        block = RoundedBlock(module, found, latents, self.plan, handover)
        before = block.error(goals)
        rate = self._choose_rate(block, latents.values(), goals)
        done = _descend(block, latents.values(), goals, rate, self.steps)
        after, names = block.error(goals), ", ".join(linear.name for linear in found)
        if not after < before:
            result.skipped.append(SiteRecord(names, "training did not lower the error of the block"))
            return
        for linear in found:
            handover.keep_weight(linear.name, widened(get_tensor(module, linear.weight)))
            set_tensor(module, linear.weight, latents[linear.weight].weight())
        what = f"error of the block {after / before:.3f} of rounding's, learning rate {rate:g}, {done} steps"
        result.changed.append(SiteRecord(names, what, {"error relative to rounding": round(after / before, 4)}))

    def _choose_rate(self, block: RoundedBlock, latents: Collection["_Latent"], goals: list[Goal]) -> float:
        """Try all on a few batches, and leave the block as the best of them made it."""
        steps = max(_FEWEST, self.steps // _TRIAL)
        start, least, best, kept = block.copies(), math.inf, self.learning_rates[0], None
        for rate in dict.fromkeys(self.learning_rates):
            block.restore(start)
            _descend(block, latents, goals[:steps], rate, steps)
            error = block.error(goals[:steps])
            if error < least:
                least, best, kept = error, rate, block.copies()
        block.restore(start if kept is None else kept)
        return best

    def _latent(self, module: GraphModule, linear: Linear, handover: PassState) -> "_Latent":
        values, factor = unfactored(module, linear, handover)
        return _Latent(values.clone().requires_grad_(), integer_format(self.plan[linear.name]), factor)


@dataclass(frozen=True, eq=False)
class _Latent(LatentWeight):
    """The float weight behind a rounded one.

    Attributes:
        values: [N, K], requires a gradient.
        factor: [K], what its columns are multiplied by after they are rounded; None for 1.
    """

    values: Tensor
    format: IntegerFormat
    factor: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        return [self.values]

    def rounded(self) -> Tensor:
        return self._multiplied(fake_quantize_weight(self.values, self.format))

    def weight(self) -> Tensor:
        return self._multiplied(self.values.detach())

    def _multiplied(self, values: Tensor) -> Tensor:
        return values if self.factor is None else values * self.factor


def _descend(
    block: RoundedBlock, latents: Collection[_Latent], goals: Sequence[Goal], rate: float, steps: int
) -> int:
    """Update the latent weights of a block with a rate that falls to 0, one goal after another.

    Returns:
        Updates done: fewer than `steps` when some rounds over all goals gave no less error than those before.
    """
    descents = [Descent(latent.values, mean_step(latent.values, latent.format)) for latent in latents]
    stretch = len(goals) * math.ceil(steps / 4 / len(goals))
    sums: list[float] = []
    for step in range(steps):
        if step % stretch == 0:
            if len(sums) > 1 and not sums[-1] < sums[-2]:
                return step
            sums.append(0.0)
        error, gradients = block.gradients([goals[step % len(goals)]])
        sums[-1] += error
        for descent, gradient in zip(descents, gradients, strict=True):
            if gradient is not None:
                descent.update(gradient, rate * (1 - step / steps))
    return steps
