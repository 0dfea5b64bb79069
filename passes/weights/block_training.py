"""What methods share that train a block to hand on what it did in float, with its weights rounded on the way."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ...errors import within
from ...graph.edit import get_tensor
from ...graph.narrow import widened
from ...graph.sites import Linear, linears
from ...graph.views import operand
from ...plan.linear_plan import LinearPlan
from ...quant.affine import grouped
from ...quant.formats import ActivationFormat, IntegerFormat, QuantizedWeight
from ...quant.learned_codes import codes_of, values_through
from ...quant.straight_through import fake_quantize_tokens
from ..base import Batch, Context, GraphPass, PassResult, PassState, RowScale, SiteRecord
from .rounding import integer_format, quantize_linears, why_not_integer
from .training import CHECKS


class LatentWeight(ABC):
    """What is trained of a weight, and the rounded weight that it stands for."""

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Tensors that require gradients, changed in place by training."""

    @abstractmethod
    def rounded(self) -> Tensor:
        """float32 [N, K], with gradients for the parameters."""


class Goal:
    """What a block shall hand on for a batch, and how much each of its tokens counts.

    Args:
        power: the error of a token is divided by the norm of its target to this power: a few tokens of huge norm
            (attention sinks) otherwise own the mean.
    """

    def __init__(self, batch: Batch, target: Tensor, power: float) -> None:
        self.batch, self._target = batch, target
        counts = target.square().sum(-1).pow(-power)
        counts = counts.masked_fill(torch.isinf(counts), 0)  # an all-zero target has no direction
        self._counts = counts if batch.mask is None else counts * batch.mask
        self.tokens = int(counts.numel() if batch.mask is None else batch.mask.sum())

    def error(self, outputs: Sequence[Tensor]) -> Tensor:
        """The sum over real tokens."""
        return ((outputs[self.batch.output] - self._target).square().sum(-1) * self._counts).sum()


_L = TypeVar("_L", bound=LatentWeight)


def goals_of(context: Context, power: float) -> list[Goal]:
    """One for each batch whose target is known; power: as `Goal` takes it."""
    return [Goal(batch, batch.target, power) for batch in context.batches if batch.target is not None]


def trainable(
    module: GraphModule, plan: Mapping[str, LinearPlan], goals: Sequence[Goal], result: PassResult
) -> list[Linear]:
    """The linears of a block that can be trained; `result` gets the others, with the reason."""
    found = []
    for linear in linears(module.graph):
        why = why_not_integer(plan, linear)
        if not why and not goals:
            why = "what the float model hands on from this block is not known"
        if why:
            result.skipped.append(SiteRecord(linear.name, why))
        else:
            found.append(linear)
    return found


def unfactored(module: GraphModule, linear: Linear, handover: PassState) -> tuple[Tensor, Tensor | None]:
    """A linear's weight as rounding is to see it, and the factor [K] of its columns after that (None: 1)."""
    w, factor = widened(get_tensor(module, linear.weight)), handover.folded.get(linear.name)
    return w if factor is None else w / factor, factor


class RoundedBlock(Interpreter):
    """A block with rounded weights and dynamic inputs, and gradients that go straight through to what is trained.

    Args:
        found: the linears that are trained.
        latents: by the name of the weight.
        plan: by linear name.
        handover: what passes before have left.
        shared: what several weights depend on.
    """

    def __init__(
        self,
        module: GraphModule,
        found: Sequence[Linear],
        latents: Mapping[str, LatentWeight],
        plan: Mapping[str, LinearPlan],
        handover: PassState,
        shared: "Shared | None" = None,
    ) -> None:
        super().__init__(module)
        self._latents, self._shared = latents, Shared() if shared is None else shared
        self._dynamic = _dynamic(found, plan, handover)
        self._row_scales: Mapping[Node, RowScale] = handover.row_scales
        self._weights: dict[str, Tensor] = {}
        self._inputs: dict[tuple[Node, ActivationFormat], Tensor] = {}

    @property
    def parameters(self) -> list[Tensor]:
        """Of all latent weights, in order, and what they share."""
        return [
            *(tensor for latent in self._latents.values() for tensor in latent.parameters),
            *self._shared.parameters,
        ]

    def run_node(self, node: Node) -> Any:
        if node.op == "get_attr" and node.target in self._weights:
            return self._weights[node.target]
        if node not in self._dynamic:
            return super().run_node(node)
        (x, *rest), options = self.fetch_args_kwargs_from_env(node)
        value, fmt = operand(node), self._dynamic[node]
        if (value, fmt) not in self._inputs:  # several linears read one value
            factor, row = self._shared.input_factor(value), self._row_scales.get(value)
            read = x if factor is None else x / factor
            read = fake_quantize_tokens(read, fmt, *(() if row is None else (row.factors, row.alpha)))
            self._inputs[value, fmt] = read if factor is None else read * factor
        return self.call_function(node.target, (self._inputs[value, fmt], *rest), options)

    @torch.no_grad()
    def error(self, goals: Sequence[Goal]) -> float:
        """The mean over all real tokens."""
        self._round()
        return sum(float(self._error(goal)) for goal in goals) / max(1, sum(goal.tokens for goal in goals))

    @torch.enable_grad()
    def gradients(self, goals: Sequence[Goal]) -> tuple[float, list[Tensor | None]]:
        """The mean error over real tokens, and its gradient for each parameter; None where nothing depends on it."""
        self._round()
        found: list[Tensor | None] = [None] * len(self.parameters)
        tokens, total = max(1, sum(goal.tokens for goal in goals)), 0.0
        for place, goal in enumerate(goals):
            error = self._error(goal) / tokens
            total += error.item()
            keep = place < len(goals) - 1  # the rounded weights are made once for all
            parts = torch.autograd.grad(error, self.parameters, allow_unused=True, retain_graph=keep)
            found = added(found, parts)
        return total, found

    def copies(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [tensor.detach().clone() for tensor in self.parameters]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Make these the parameters."""
        for tensor, value in zip(self.parameters, values, strict=True):
            tensor.copy_(value)

    def _round(self) -> None:
        self._weights = {name: latent.rounded() for name, latent in self._latents.items()}

    def _error(self, goal: Goal) -> Tensor:
        self._inputs.clear()
        return goal.error(self.run(*goal.batch.inputs))


def added(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of two errors as that of their sum."""
    return [a if b is None else b if a is None else a + b for a, b in zip(some, others, strict=True)]


def _dynamic(
    found: Sequence[Linear], plan: Mapping[str, LinearPlan], handover: PassState
) -> dict[Node, ActivationFormat]:
    """By linear, the format of its input, where that is taken token by token."""
    formats = {}
    for linear in found:
        if (asked := plan[linear.name].chosen.activation) is not None:
            formats[linear.node] = handover.formats.get(linear.input, asked)
    return {node: fmt for node, fmt in formats.items() if fmt.kind == "dynamic"}


class Shared:
    """What is trained beside the weights of a block: nothing, unless a method has something."""

    @property
    def parameters(self) -> list[Tensor]:
        """As those of a latent weight."""
        return []

    def input_factor(self, value: Node) -> Tensor | None:
        """[K], what a value will be divided by before it is rounded, as linears carry it; None for 1."""
        return None

    def settle(self, module: GraphModule) -> None:
        """Put what was trained into the block, before codes are made."""


# Changes parameters by their gradients; the second argument is the share of the steps that is left, from 1 to 0.
Update = Callable[[Sequence[Tensor | None], float], None]


@dataclass(frozen=True)
class Fitted:
    """What training came to.

    Attributes:
        before, after: mean error of a token over all batches; at most as much after.
        step: the one whose parameters are kept; 0 where training brought nothing.
    """

    before: float
    after: float
    step: int


def fit(block: RoundedBlock, goals: Sequence[Goal], update: Update, steps: int, batches: int = 1) -> Fitted:
    """Train the parameters of a block and leave the best that were met.

    Args:
        batches: of a step; all goals are seen in turn.
    """
    before = least = block.error(goals)
    best, at = block.copies(), 0
    checks = {math.ceil(steps * part / CHECKS) for part in range(1, CHECKS + 1)}
    for step in range(steps):
        drawn = [goals[(step * batches + place) % len(goals)] for place in range(min(batches, len(goals)))]
        _, gradients = block.gradients(drawn)
        with torch.no_grad():
            update(gradients, 1 - step / steps)
        if step + 1 in checks and (error := block.error(goals)) < least:
            least, best, at = error, block.copies(), step + 1
    block.restore(best)
    return Fitted(before, least, at)


def adam(parts: Sequence[tuple[Sequence[Tensor], float]]) -> Update:
    """Adam (arXiv 1412.6980) with learning rates that fall to 0.

    Args:
        parts: parameters and their learning rate; one after another they are those of the block.
    """
    optimizer = torch.optim.Adam([{"params": list(tensors), "lr": rate} for tensors, rate in parts if tensors])
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [tensor for tensors, _ in parts for tensor in tensors]

    def update(gradients: Sequence[Tensor | None], left: float) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * left
        for tensor, gradient in zip(parameters, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return update


class LatentCodes(LatentWeight):
    """A latent weight that says itself which codes it stands for."""

    @abstractmethod
    def codes(self) -> QuantizedWeight:
        """What `rounded` gives, as codes, without the factor of the columns."""


class GridWeight(LatentCodes):
    """A weight in steps between codes, a scale and a zero point, all of them functions of what is trained.

    Args:
        w: float32 [N, K], see `unfactored`; not changed.
        factor: [K], what its columns are multiplied by after they are rounded; None for 1.
    """

    def __init__(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> None:
        self.format, self._factor, self.features = fmt, factor, w.shape[1]
        self.groups = grouped(w, fmt)

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Steps [N, G, group], scale and zero point, as `values_through` takes them."""

    def rounded(self) -> Tensor:
        return self.multiplied(values_through(*self.grid(), self.format, self.features))

    def multiplied(self, values: Tensor) -> Tensor:
        """Values [N, K] times the factor of the columns."""
        return values if self._factor is None else values * self._factor

    def codes(self) -> QuantizedWeight:
        return codes_of(*self.grid(), self.format, self.features)


@dataclass(frozen=True)
class TrainedCodes(GraphPass):
    """Trains what makes the codes of all weights of a block together, and makes them.

    What is minimised is the squared error of what the block hands on, on the inputs that the quantized blocks before it
    make, against what the float model hands on there. Dynamic inputs are rounded on the way forward, static ones stay
    in float. Linears that cannot be trained are rounded to nearest.

    Attributes:
        plan: by linear name; linears without a scheme stay as they are.
        steps: updates of a block.
        batches: calibration batches of a step.
        token_norm_power: as `Goal` takes it.
    """

    plan: Mapping[str, LinearPlan]
    steps: int = 100
    batches: int = 1
    token_norm_power: float = 1.0
    preserves_values: ClassVar[bool] = True

    @abstractmethod
    def latent(self, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> LatentCodes:
        """What is trained of a weight [N, K], see `unfactored`, and stands for its nearest codes before that."""

    def shared(
        self, module: GraphModule, found: Sequence[Linear], latents: Mapping[str, LatentCodes], handover: PassState
    ) -> Shared:
        """What is trained beside the weights."""
        return Shared()

    def block(
        self, module: GraphModule, found: Sequence[Linear], latents: Mapping[str, LatentCodes], handover: PassState,
        shared: Shared,
    ) -> RoundedBlock:  # fmt: skip
        """What is trained."""
        return RoundedBlock(module, found, latents, self.plan, handover, shared)

    @abstractmethod
    def updates(self, latents: Sequence[LatentCodes], shared: Shared) -> Update:
        """What changes the parameters of all of them, in order."""

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result, handover = PassResult(), context.handover
        goals = goals_of(context, self.token_norm_power)
        found, latents = trainable(module, self.plan, goals, result), {}
        for linear in found:
            with within(linear.name):
                w, factor = unfactored(module, linear, handover)
                latents[linear.weight] = self.latent(w, integer_format(self.plan[linear.name]), factor)
        if found:
            shared = self.shared(module, found, latents, handover)
            block = self.block(module, found, latents, handover, shared)
            done = fit(block, goals, self.updates(list(latents.values()), shared), self.steps, self.batches)
            shared.settle(module)
            result.changed.append(trained_record(found, done, self.steps))

        def quantize(linear: Linear, w: Tensor, fmt: IntegerFormat, factor: Tensor | None) -> QuantizedWeight:
            latent = latents.get(linear.weight)
            return fmt.round_to_nearest(w) if latent is None else latent.codes()

        rounded = quantize_linears(module, self.plan, handover, quantize)
        known = {record.site for record in result.skipped}
        result.changed += rounded.changed
        result.skipped += [record for record in rounded.skipped if record.site not in known]
        return result


def trained_record(found: Sequence[Linear], done: Fitted, steps: int) -> SiteRecord:
    """What a report says of a trained block."""
    names, share = ", ".join(linear.name for linear in found), done.after / done.before if done.before > 0 else 1.0
    what = f"error of the block {share:.3f} of rounding's, step {done.step} of {steps}"
    return SiteRecord(names, what, {"error relative to rounding": round(share, 4)})
