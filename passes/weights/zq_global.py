"""ZQ-Global (ZeroQuant-V2, arXiv 2303.08302): all weights of a block trained together against the float block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ...graph.edit import get_tensor, set_tensor
from ...graph.narrow import widened
from ...graph.sites import Linear, linears
from ...graph.views import operand
from ...plan.linear_plan import LinearPlan
from ...quant.formats import ActivationFormat, IntegerFormat
from ...quant.straight_through import Descent, fake_quantize_tokens, fake_quantize_weight, mean_step
from ...recipe.registry import method
from ..base import Batch, Context, GraphPass, PassResult, PassState, RowScale, SiteRecord
from .rounding import integer_format, why_not_integer
from .rtn import RoundToNearest
from .training import TrainedWeights

# A learning rate is tried for a tenth of the steps, but not for fewer than rank rates as all steps do.
_TRIAL, _FEWEST = 10, 4


@method("weights", "zq_global")
class ZQGlobalSection(TrainedWeights):
    """Weights trained so that each block hands on what it did in float when they are rounded; then rounded to nearest.

    The norm of a token is that of its target.
    """

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
        result, found = PassResult(), []
        goals = [_Goal(b, b.target, self.token_norm_power) for b in context.batches if b.target is not None]
        for linear in linears(module.graph):
            why = why_not_integer(self.plan, linear)
            if not why and not goals:
                why = "what the float model hands on from this block is not known"
            if why:
                result.skipped.append(SiteRecord(linear.name, why))
            else:
                found.append(linear)
        if found:
            self._train(module, found, goals, context.handover, result)
        return result

    def _train(
        self, module: GraphModule, found: list[Linear], goals: list["_Goal"], handover: PassState, result: PassResult
    ) -> None:
        latents = {linear.weight: self._latent(module, linear, handover) for linear in found}
        block = _Rounding(module, latents, self._dynamic(found, handover), handover.row_scales)
        before = block.error(goals)
        rate = self._choose_rate(block, goals)
        done = block.descend(goals, rate, self.steps)
        after, names = block.error(goals), ", ".join(linear.name for linear in found)
        if not after < before:
            result.skipped.append(SiteRecord(names, "training did not lower the error of the block"))
            return
        for linear in found:
            handover.keep_weight(linear.name, widened(get_tensor(module, linear.weight)))
            set_tensor(module, linear.weight, latents[linear.weight].weight())
        what = f"error of the block {after / before:.3f} of rounding's, learning rate {rate:g}, {done} steps"
        result.changed.append(SiteRecord(names, what, {"error relative to rounding": round(after / before, 4)}))

    def _choose_rate(self, block: "_Rounding", goals: list["_Goal"]) -> float:
        """Try all on a few batches, and leave the block as the best of them made it."""
        steps = max(_FEWEST, self.steps // _TRIAL)
        start, least, best, kept = block.copies(), math.inf, self.learning_rates[0], None
        for rate in dict.fromkeys(self.learning_rates):
            block.restore(start)
            block.descend(goals[:steps], rate, steps)
            error = block.error(goals[:steps])
            if error < least:
                least, best, kept = error, rate, block.copies()
        block.restore(start if kept is None else kept)
        return best

    def _latent(self, module: GraphModule, linear: Linear, handover: PassState) -> "_Latent":
        w, factor = widened(get_tensor(module, linear.weight)), handover.folded.get(linear.name)
        values = w.clone() if factor is None else w / factor
        return _Latent(values.requires_grad_(), integer_format(self.plan[linear.name]), factor)

    def _dynamic(self, found: list[Linear], handover: PassState) -> dict[Node, ActivationFormat]:
        """By linear, the format of its input, where that is taken token by token."""
        formats = {}
        for linear in found:
            if (asked := self.plan[linear.name].chosen.activation) is not None:
                formats[linear.node] = handover.formats.get(linear.input, asked)
        return {node: fmt for node, fmt in formats.items() if fmt.kind == "dynamic"}


@dataclass(frozen=True, eq=False)
class _Latent:
    """The float weight behind a rounded one.

    Attributes:
        values: [N, K], requires a gradient.
        factor: [K], what its columns are multiplied by after they are rounded; None for 1.
    """

    values: Tensor
    format: IntegerFormat
    factor: Tensor | None

    def rounded(self) -> Tensor:
        return self._multiplied(fake_quantize_weight(self.values, self.format))

    def weight(self) -> Tensor:
        return self._multiplied(self.values.detach())

    def _multiplied(self, values: Tensor) -> Tensor:
        return values if self.factor is None else values * self.factor


class _Goal:
    """What a block shall hand on for a batch, and how much each of its tokens counts."""

    def __init__(self, batch: Batch, target: Tensor, power: float) -> None:
        self.batch, self._target = batch, target
        counts = target.square().sum(-1).pow(-power)
        counts = counts.masked_fill(torch.isinf(counts), 0)  # an all-zero target has no direction
        self._counts = counts if batch.mask is None else counts * batch.mask
        self.tokens = int(counts.numel() if batch.mask is None else batch.mask.sum())

    def error(self, outputs: Sequence[Tensor]) -> Tensor:
        """The sum over real tokens."""
        return ((outputs[self.batch.output] - self._target).square().sum(-1) * self._counts).sum()


class _Rounding(Interpreter):
    """A block with rounded weights and dynamic inputs, and gradients that go straight through to the latent weights.

    Args:
        latents: by the name of the weight.
        dynamic: by linear, the format of its input.
        row_scales: by value, how its dynamic scale follows from a token, where it is not the largest magnitude.
    """

    def __init__(
        self,
        module: GraphModule,
        latents: Mapping[str, _Latent],
        dynamic: Mapping[Node, ActivationFormat],
        row_scales: Mapping[Node, RowScale],
    ) -> None:
        super().__init__(module)
        self._latents, self._dynamic, self._row_scales = latents, dynamic, row_scales
        self._weights: dict[str, Tensor] = {}
        self._inputs: dict[tuple[Node, ActivationFormat], Tensor] = {}

    def run_node(self, node: Node) -> Any:
        if node.op == "get_attr" and node.target in self._weights:
            return self._weights[node.target]
        if node not in self._dynamic:
            return super().run_node(node)
        (x, *rest), options = self.fetch_args_kwargs_from_env(node)
        value, fmt = operand(node), self._dynamic[node]
        if (value, fmt) not in self._inputs:  # several linears read one value
            row = self._row_scales.get(value)
            how = () if row is None else (row.factors, row.alpha)
            self._inputs[value, fmt] = fake_quantize_tokens(x, fmt, *how)
        return self.call_function(node.target, (self._inputs[value, fmt], *rest), options)

    @torch.no_grad()
    def error(self, goals: Sequence[_Goal]) -> float:
        """The mean over all real tokens."""
        self._round()
        return sum(float(self._error(goal)) for goal in goals) / max(1, sum(goal.tokens for goal in goals))

    @torch.enable_grad()
    def descend(self, goals: Sequence[_Goal], rate: float, steps: int) -> int:
        """Update the latent weights with a rate that falls to 0, one goal after another.

        Returns:
            Updates done: fewer than `steps` when some rounds over all goals gave no less error than those before.
        """
        latents = self._latents.values()
        values = [latent.values for latent in latents]
        descents = [Descent(latent.values, mean_step(latent.values, latent.format)) for latent in latents]
        stretch = len(goals) * math.ceil(steps / 4 / len(goals))
        sums: list[float] = []
        for step in range(steps):
            if step % stretch == 0:
                if len(sums) > 1 and not sums[-1] < sums[-2]:
                    return step
                sums.append(0.0)
            self._round()
            goal = goals[step % len(goals)]
            error = self._error(goal) / max(1, goal.tokens)
            sums[-1] += error.item()
            gradients = torch.autograd.grad(error, values, allow_unused=True)
            for descent, gradient in zip(descents, gradients, strict=True):
                if gradient is not None:  # None where nothing that is handed on depends on the weight
                    descent.update(gradient, rate * (1 - step / steps))
        return steps

    def copies(self) -> list[Tensor]:
        """The latent weights as they are now."""
        return [latent.values.detach().clone() for latent in self._latents.values()]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Make these the latent weights."""
        for latent, value in zip(self._latents.values(), values, strict=True):
            latent.values.copy_(value)

    def _round(self) -> None:
        self._weights = {name: latent.rounded() for name, latent in self._latents.items()}

    def _error(self, goal: _Goal) -> Tensor:
        self._inputs.clear()
        return goal.error(self.run(*goal.batch.inputs))
