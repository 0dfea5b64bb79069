"""Processes that make one export together, as torchrun starts them: what they exchange, and what each of them is.

Each takes a part of the calibration samples and of the weights; the first one writes. Alone, all of this does nothing.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .errors import InputError, in_a_line

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # a rank that is alive may have that much more to do; one that is dead is known at once


class PartDone(SystemExit):
    """This process has done its part, and another one writes the export."""

    def __init__(self) -> None:
        super().__init__(0)


def asked() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def size() -> int:
    """How many processes work together in here."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if _joined() else 0


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the processes that torchrun has started, until the `with` ends.

    Raises:
        InputError: they do not find each other.
    """
    if asked() == 1 or _joined():
        yield
        return
    with _together():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if rank() > 0:
        logging.getLogger(__package__).setLevel(logging.ERROR)  # the first one says it
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and nccl, whose peers close their connections when they end
        raise InputError(
            f"another rank has ended ({in_a_line(error)})", place=f"rank {os.environ.get('RANK', 0)}",
            remedy="Its own message says why; --resume goes on from the blocks that are finished",
        ) from error  # fmt: skip


def share(count: int) -> slice:
    """Which of `count` things are this process's."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    if size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    with _together():
        distributed.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with _together():
        distributed.all_gather_object(found, value)
    return found


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in the tensor's own memory."""
    if size() > 1:
        with _together():
            distributed.all_reduce(tensor)
    return tensor


def owners(work: Sequence[float]) -> list[int]:
    """Which process does each of several jobs, so that all have about as much to do; the same in all of them.

    Args:
        work: of each job, in any unit.
    """
    done = [0.0] * size()
    found = [0] * len(work)
    for job in sorted(range(len(work)), key=lambda job: -work[job]):
        found[job] = done.index(min(done))
        done[found[job]] += work[job]
    return found


def combine(statistics: Sequence[Any]) -> None:
    """Let every statistic know what those of the other processes have seen.

    Raises:
        InputError: one of them has no `across`, which does that.
    """
    if size() == 1:
        return
    for statistic in {id(s): s for s in statistics}.values():
        if not hasattr(statistic, "across"):
            raise InputError(
                f"{type(statistic).__name__} can only be gathered by one process", place="torchrun",
                remedy="Export without torchrun, or with another method",
            )  # fmt: skip
        statistic.across()
