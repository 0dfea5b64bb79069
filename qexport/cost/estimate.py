"""What an export is expected to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..formatting import duration
from .machine import Machine, seconds
from .work import Data, Effort, Reading, Work, block_memory, block_work

SHORT = 1e11  # FLOP that any machine does in seconds, for which none is measured


@dataclass(frozen=True)
class Estimate:
    """What the blocks of an export take: capture, the comparison with the witness and writing come on top.

    Attributes:
        work: of all blocks.
        seconds: of calibrating and rounding them on the machine that was measured; None where that is too short to say.
        memory: bytes at the peak, libraries not included.
        disk: bytes of the export, and of what its blocks are kept in until it is written.
    """

    work: Work
    seconds: float | None
    memory: int
    disk: int

    def sentence(self) -> str:
        busy = "on this machine as busy as it is"
        time = "a few seconds" if self.seconds is None else f"about {duration(self.seconds)} {busy}"
        return (
            f"{time}, for {self.work.flops / 1e12:,.2f} TFLOP, {self.memory / 1e9:,.1f} GB of memory besides the "
            f"libraries, and up to {self.disk / 1e9:,.1f} GB of disk"
        )


def estimated(
    blocks: Mapping[str, Sequence[Reading]], data: Data, effort: Effort, machine: Machine | None, file: int
) -> Estimate:
    """The estimate for an export.

    Args:
        blocks: by name, what is read in it.
        machine: None where no time is wanted.
        file: bytes of the export.
    """
    parts = {name: block_work(readings, data, effort) for name, readings in blocks.items()}
    work = sum(parts.values(), Work())
    taken = None
    if machine is not None:
        taken = sum(seconds(part, machine, tuple(blocks[name]), data) for name, part in parts.items())
    memory = max((block_memory(readings, data, effort) for readings in blocks.values()), default=0)
    codes = sum(r.weights for readings in blocks.values() for r in readings if r.quantized)  # a byte each
    return Estimate(work, taken, memory, file + codes)


def both(parts: Sequence[Estimate]) -> Estimate:
    """The estimate for models that are exported one after another, and lie on the disk together."""
    times = [part.seconds for part in parts if part.seconds is not None]
    return Estimate(
        sum((part.work for part in parts), Work()), sum(times) if times else None, max(part.memory for part in parts),
        sum(part.disk for part in parts),
    )  # fmt: skip
