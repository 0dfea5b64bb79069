"""Seconds that work takes on a machine, from a few speeds of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from .work import FLOAT, Data, Reading, Work


@dataclass(frozen=True)
class Machine:
    """Where is calibrated.

    Attributes:
        flops: FLOP a second of a large product of float32 matrices, of a device.
        bandwidth: bytes a second through the memory of a device.
        devices: how many share the work.
        link: bytes a second between two of them.
        reached: the share of `flops` that products reach between all else, on a CPU of 16 cores about a half.
        host: seconds for which the host is busy with one weight beside all products: reading, casting, packing and
            writing it. The value is what a layer of 1B's shape took on an H200, where all else is little.
    """

    flops: float
    bandwidth: float
    devices: int = 1
    link: float = 0.0
    reached: float = 0.5
    host: float = 2e-8


def seconds(work: Work, machine: Machine, readings: tuple[Reading, ...] = (), data: Data | None = None) -> float:
    """Seconds of a block.

    With several devices samples are split, values with their linears are spread, and the Hessians' sums and the codes
    are exchanged.

    Args:
        readings, data: of the block, for what several devices exchange.
    """
    rate, n = machine.flops * machine.reached, machine.devices
    alone = max((work.factors + work.rounding) / n, work.largest)
    taken = ((work.forward + work.sums) / n + alone) / rate + work.moved / n / machine.bandwidth
    taken += work.weights / n * machine.host
    if n > 1 and data is not None:
        sums = FLOAT * sum(r.inputs**2 for r in readings if r.quantized and work.sums)
        codes = sum(r.weights for r in readings if r.quantized)
        taken += (2 * sums + codes) * (n - 1) / n / machine.link
    return taken


@cache
def measured(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Machine:
    """The machine that this process runs on as busy as it is, from a product and a copy of a few milliseconds.

    Args:
        clock: time.process_time for processor seconds, which do not grow with what else the machine does.
    """
    size = 4096 if device.type == "cuda" else 1024
    a, out = torch.randn(size, size, device=device), torch.empty(size, size, device=device)
    long, copy = torch.randn(1 << 24, device=device), torch.empty(1 << 24, device=device)

    def timed(what: Callable[[], object]) -> float:
        taken = []
        for _ in range(4):
            started = clock()
            what()
            float(out[0, 0]) + float(copy[0])  # a device is done when its result is here
            taken.append(clock() - started)
        return median(taken[1:])

    product, copied = timed(lambda: torch.mm(a, a, out=out)), timed(lambda: copy.copy_(long))
    return Machine(2 * size**3 / product, 2 * FLOAT * len(long) / copied)
