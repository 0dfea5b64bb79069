"""The sections that methods share which train weights."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from ...recipe.methods import WeightMethod

CHECKS = 10  # how often in a training of blocks the error over all batches is taken, to keep the best that was met


def _positive(rates: tuple[float, ...]) -> tuple[float, ...]:
    if not all(rate > 0 for rate in rates):
        raise ValueError("learning rates are above 0", "Leave the key out for 0.01, 0.03 and 0.1")
    return rates


class TrainedWeights(WeightMethod):
    """Attributes:
    learning_rates: tried one after another, as shares of the mean step between codes; the one with the smallest error
        stays.
    steps: most updates with one learning rate; less when the error stops falling.
    token_norm_power: a token is divided by its norm to this power; 0 leaves tokens as they are, 1 keeps the few tokens
        with huge activations from drowning out the others.
    """

    learning_rates: Annotated[tuple[float, ...], Field(min_length=1, max_length=16), AfterValidator(_positive)] = (
        0.01, 0.03, 0.1,
    )  # fmt: skip
    steps: int = Field(40, ge=1, le=100_000)
    token_norm_power: float = Field(0.75, ge=0, le=2)
    calibrates: ClassVar[bool] = True
    kl_left: ClassVar[float] = 0.35


class TrainedBlocks(WeightMethod):
    """Attributes:
    steps: updates of a block.
    batches: calibration batches that a step sees.
    token_norm_power: a token is divided by the norm of what the block hands on there to this power; 0 leaves tokens as
        they are, 1 keeps the few tokens with huge activations from drowning out the others.
    """

    steps: int = Field(100, ge=1, le=100_000)
    batches: int = Field(1, ge=1, le=1024)
    token_norm_power: float = Field(1.0, ge=0, le=2)
    calibrates: ClassVar[bool] = True

    def training_passes(self, samples: int, batch_size: int) -> float:
        return 3 * self.steps * self.batches * batch_size / samples + 1 + CHECKS
