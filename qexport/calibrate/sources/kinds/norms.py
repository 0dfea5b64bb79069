"""Without data, for models of pictures and sound: inputs under which the statistics that norms keep come out again.

A batch norm keeps the mean and the variance that every channel of its input had in training. Inputs begin as random
numbers and go down the gradient of how far their own means and deviations are from those, as Q-ASR does it for speech
(Kim et al., "Integer-only zero-shot quantization for efficient speech recognition", ICASSP 2022) and ZeroQ did it for
pictures. Layer norms keep nothing of what went through them: a model that has no others is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ....capture.module import evaluating
from ....errors import InputError
from ..registry import Model, Source, source
from ..samples import Samples

STEPS, RATE, TOGETHER = 100, 0.1, 32  # of Adam, and rows that are matched at once
_LEAST = 1e-5  # of a variance that a norm keeps: a channel that was always the same


@source
class Norms(Source):
    form, tokenizes, makes_features = '"norms"', False, True

    @classmethod
    def takes(cls, name: str) -> bool:
        return name == "norms"

    def samples(self, model: Model) -> Samples:
        raise InputError(
            "norms of models that read text keep no statistics", place="calibration",
            remedy='Give a text, or source "self", which the model writes',
        )  # fmt: skip

    def features(self, module: torch.nn.Module | None, drawn: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        remedy = "Give what its processor makes in a safetensors file, or random numbers: --calibration random"
        if module is None:
            raise InputError("the model is not in memory as a whole", place="calibration norms", remedy=remedy)
        norms = batch_norms(module)
        if not norms:
            raise InputError("no norm of the model keeps statistics", place="calibration norms", remedy=remedy)
        parted = zip(*(tensor.split(TOGETHER) for tensor in drawn.values()), strict=True)
        groups = [dict(zip(drawn, parts, strict=True)) for parts in parted]
        found = [matched(module, group, norms) for group in groups]
        joined = {name: torch.cat([made[name] for made, _, _ in found]) for name in drawn}
        before = sum(first for _, first, _ in found) / len(found)
        after = sum(last for _, _, last in found) / len(found)
        described = f"that match the statistics of {len(norms)} norms ({before:.3g} off, then {after:.3g}"
        return joined, f"{described}; seed {self.spec.seed})"


def batch_norms(module: torch.nn.Module) -> list[_BatchNorm]:
    """Those that keep statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def distance(value: Tensor, norm: _BatchNorm) -> Tensor:
    """How far the statistics of a norm's input are from those it keeps, a scalar.

    Per channel the squared difference of the means over the kept variance, and of the deviations over the kept one;
    the mean over channels.

    Args:
        value: [rows, channels] or [rows, channels, ...].
    """
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise TypeError("a norm without statistics")
    channels = value.transpose(0, 1).flatten(1)
    kept = variance.clamp_min(_LEAST)
    # The gradient of a root at 0 is infinite: a channel of zeros has none to follow.
    deviation = (channels.var(1, correction=0) + _LEAST).sqrt()
    return ((channels.mean(1) - mean).square() / kept + (deviation / kept.sqrt() - 1).square()).mean()


def matched(
    module: torch.nn.Module, drawn: Mapping[str, Tensor], norms: list[_BatchNorm], steps: int = STEPS
) -> tuple[dict[str, Tensor], float, float]:
    """Inputs of a module that match what its norms keep.

    Args:
        drawn: where they begin, by name.
        norms: the mean of their distances is what goes down.
        steps: of Adam, the rate falling to 0 as a cosine.

    Returns:
        the inputs with the least distance on the way, the distance at the beginning, and theirs.
    """
    free = {name: _Free(tensor) for name, tensor in drawn.items()}
    leaves = [leaf for each in free.values() for leaf in each.leaves]
    optimizer = torch.optim.Adam(leaves, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first, best, kept = None, float("inf"), dict(drawn)
    with _distances(norms) as sums, evaluating(module), torch.enable_grad():
        for step in range(steps + 1):
            given = {name: each.value() for name, each in free.items()}
            loss = sums(partial(module, **given)) / len(norms)
            now = float(loss.detach())
            first = now if first is None else first
            if now < best:
                best, kept = now, {name: tensor.detach().clone() for name, tensor in given.items()}
            if step == steps or not loss.requires_grad:
                break
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient  # of these alone: the model's weights get none
            optimizer.step()
            schedule.step()
    return kept, first or 0.0, best


class _Free:
    """An input that may change: numbers of its own, times a gain and plus an offset that rows share.

    How loud an input is can be off by orders of magnitude, for which steps of one size for every number would be many.
    """

    def __init__(self, drawn: Tensor):
        sizes = [[1] * drawn.dim()]
        if drawn.dim() > 2:  # channels or bins, in front of what goes on in time or behind it
            sizes += [[size if i == axis else 1 for i, size in enumerate(drawn.shape)] for axis in (1, drawn.dim() - 1)]
        self._numbers = drawn.clone().requires_grad_()
        self._gains = [torch.zeros(size, requires_grad=True) for size in sizes]
        self._offsets = [torch.zeros(size, requires_grad=True) for size in sizes]

    @property
    def leaves(self) -> list[Tensor]:
        return [self._numbers, *self._gains, *self._offsets]

    def value(self) -> Tensor:
        gain, offset = self._gains[0], self._offsets[0]
        for more, further in zip(self._gains[1:], self._offsets[1:], strict=True):
            gain, offset = gain + more, offset + further
        return self._numbers * gain.exp() + offset


@contextmanager
def _distances(norms: list[_BatchNorm]) -> Iterator[Callable[[Callable[[], object]], Tensor]]:
    """Yields a function that makes a call and returns the sum of the distances of all norms in it."""
    found: list[Tensor] = []

    def watch(norm: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(norm, _BatchNorm):
            found.append(distance(inputs[0], norm))

    handles = [norm.register_forward_pre_hook(watch) for norm in norms]

    def sums(call: Callable[[], object]) -> Tensor:
        found.clear()
        call()
        return torch.stack(found).sum() if found else torch.zeros(())

    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
