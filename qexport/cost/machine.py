"""Seconds that work takes on a machine, from a few speeds of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from ..device import products_in
from .work import FLOAT, Data, Reading, Work


@dataclass(frozen=True)
class Machine:
    """Where is calibrated.

    Attributes:
        flops: FLOP a second of a large product of float32 matrices, of a device.
        bandwidth: bytes a second through the memory of a device.
        devices: how many share the work.
        link: bytes a second between two of them.
        reached: the share of those speeds that products reach between all else (`share_reached`).
        host: seconds for which the host is busy with one weight beside all products: reading, casting, packing and
            writing it. The value is what a layer of 1B's shape took on an H200, where all else is little.
        streamed: as `flops`, of products while data pass through blocks (`calibration.products`); 0: the same.
    """

    flops: float
    bandwidth: float
    devices: int = 1
    link: float = 0.0
    reached: float = 0.5
    host: float = 2e-8
    streamed: float = 0.0


def share_reached(threads: int) -> float:
    """Machine.reached for a CPU: what a layer of 1B's shape took on one thread, and on 16. All between products, such
    as the columns of GPTQ, gains less from threads than they do."""
    return 0.67 / (1 + 0.06 * (threads - 1))


def seconds(work: Work, machine: Machine, readings: tuple[Reading, ...] = (), data: Data | None = None) -> float:
    """Seconds of a block.

    With several devices samples are split, values with their linears are spread, and the Hessians' sums and the codes
    are exchanged.

    Args:
        readings, data: of the block, for what several devices exchange.
    """
    n = machine.devices
    alone = max((work.factors + work.rounding) / n, work.largest) / machine.flops
    products = (work.forward + work.sums) / n / (machine.streamed or machine.flops)
    taken = (products + alone) / machine.reached + work.moved / n / machine.bandwidth
    taken += work.weights / n * machine.host
    if n > 1 and data is not None:
        sums = FLOAT * sum(r.inputs**2 for r in readings if r.quantized and work.sums)
        codes = sum(r.weights for r in readings if r.quantized)
        taken += (2 * sums + codes) * (n - 1) / n / machine.link
    return taken


@cache
def measured(
    device: torch.device, clock: Callable[[], float] = time.perf_counter, products: str = "float32"
) -> Machine:
    """The machine that this process runs on as busy as it is, from two products and a copy of a few milliseconds.

    Args:
        clock: time.process_time for processor seconds, which do not grow with what else the machine does.
        products: `calibration.products`.
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

    def product() -> float:
        return 2 * size**3 / timed(lambda: torch.mm(a, a, out=out))

    flops, bandwidth = product(), 2 * FLOAT * len(long) / timed(lambda: copy.copy_(long))
    with products_in(products):
        streamed = flops if products == "float32" else product()
    reached = share_reached(torch.get_num_threads()) if device.type == "cpu" else Machine.reached
    return Machine(flops, bandwidth, reached=reached, streamed=streamed)
