"""What calibrating and rounding a block takes, in FLOP and bytes, from the shapes of its linears."""

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4  # bytes of a number while it is computed with


@dataclass(frozen=True)
class Reading:
    """Linears that read one value.

    Attributes:
        inputs: features of the value; outputs: of each linear.
        quantized: whether their weights are.
    """

    inputs: int
    outputs: tuple[int, ...]
    quantized: bool = True

    @property
    def weights(self) -> int:
        return self.inputs * sum(self.outputs)


@dataclass(frozen=True)
class Data:
    """What is calibrated on; 0 samples for nothing.

    Attributes:
        samples: sequences of `length` tokens; batch: of them, in a forward pass.
        hidden: features of the value that blocks hand on.
    """

    samples: int
    length: int
    batch: int
    hidden: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


@dataclass(frozen=True)
class Effort:
    """What a recipe does with a block.

    Attributes:
        passes: forward passes of all calibration data through it, and what training costs in such.
        hessians: whether codes are found by the Hessians of what linears read.
        searches: how often a weight is rounded to nearest to find a scale.
    """

    passes: float
    hessians: bool = False
    searches: int = 1


@dataclass(frozen=True)
class Work:
    """FLOP in products of matrices, by what they are for, and bytes that pass through memory besides.

    Attributes:
        forward, sums: grow with the calibration data: products with weights and in attention, and sums of Hessians.
        factors, rounding: do not: factors of Hessians, and codes.
        largest: of factors and rounding, what the largest value with its linears takes, which one device does alone.
        moved: bytes.
        weights: numbers that are read, brought to float32, and written as codes by the host.
    """

    forward: float = 0.0
    sums: float = 0.0
    factors: float = 0.0
    rounding: float = 0.0
    largest: float = 0.0
    moved: float = 0.0
    weights: int = 0

    @property
    def flops(self) -> float:
        return self.forward + self.sums + self.factors + self.rounding

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward, self.sums + other.sums, self.factors + other.factors,
            self.rounding + other.rounding, max(self.largest, other.largest), self.moved + other.moved,
            self.weights + other.weights,
        )  # fmt: skip


def block_work(readings: Sequence[Reading], data: Data, effort: Effort) -> Work:
    """What a block takes.

    A pass is 2 N K FLOP a token for a weight [N, K], and 4 S d for attention over S tokens; the sum of a Hessian K^2,
    as half of a symmetric matrix is left out; its factor 2/3 K^3 and the columns of a weight N K^2. Through memory go
    weights for every batch, each value that linears read or make, and a weight several times when it is rounded.
    """
    weights = sum(r.weights for r in readings)
    values = sum(r.inputs + sum(r.outputs) for r in readings)
    batches = -(-data.samples // data.batch) if data.samples else 0
    forward = effort.passes * data.tokens * (2.0 * weights + 4.0 * data.length * data.hidden)
    moved = FLOAT * effort.passes * (batches * weights + 2.0 * data.tokens * values)
    rounded = [r for r in readings if r.quantized]
    moved += _PASSES_OF_ROUNDING * FLOAT * effort.searches * sum(r.weights for r in rounded)
    if not effort.hessians or not data.samples:
        return Work(forward=forward, moved=moved, weights=weights)
    each = [(2 / 3 * r.inputs**3, float(r.inputs) * r.weights) for r in rounded]
    return Work(
        forward, float(data.tokens) * sum(r.inputs**2 for r in rounded), sum(f for f, _ in each),
        sum(c for _, c in each), max((f + c for f, c in each), default=0.0),
        moved + _PASSES_OF_GPTQ * FLOAT * sum(r.weights for r in rounded), weights,
    )  # fmt: skip


def block_memory(readings: Sequence[Reading], data: Data, effort: Effort) -> int:
    """Bytes at the peak of a block: its weights, activations of all samples twice, two Hessians of the widest value and
    the weights that are rounded by them, and what one batch makes of the widest value."""
    weights = sum(r.weights for r in readings)
    between = 2 * data.tokens * data.hidden
    batch = data.batch * data.length * max((r.inputs + 2 * sum(r.outputs) for r in readings), default=0)
    rounding = max((r.inputs**2 * 2 + 2 * max(r.outputs) * r.inputs for r in readings if r.quantized), default=0)
    if not effort.hessians:
        rounding = max((2 * max(r.outputs) * r.inputs for r in readings if r.quantized), default=0)
    return FLOAT * (weights + between + max(batch, rounding))


_PASSES_OF_ROUNDING = 8  # over a weight: ranges, scales, codes, packing
_PASSES_OF_GPTQ = 40  # over a weight: columns are rounded one by one, in strips that stay in the processor's cache
