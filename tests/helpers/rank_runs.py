"""Several processes that make one export, as torchrun starts them: without torchrun, which takes seconds to start."""

import os
import socket
import sys
from pathlib import Path

import torch

from helpers.commands import Command
from qexport import ranks
from qexport.cli import main
from qexport.quant.formats import ActivationFormat
from qexport.quant.hessian import HessianStatistic
from qexport.quant.observers import (
    AbsmaxObserver,
    ChannelAbsmax,
    ChannelMeanAbs,
    CompositeObserver,
    MseObserver,
    PercentileObserver,
    RowSample,
)
from qexport.quant.token_clip import TokenClip
from qexport.quant.zero_fraction import RangeAndKernel

ROWS, FEATURES = 400, 24


def started(notes: Path, count: int, *arguments: object, work=None) -> list[Command]:
    """`qexport ...` in `count` processes, or another function of this file; their notes are in folders by rank."""
    notes.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Command(notes / str(rank), rank, count, port, *arguments, work=work or command) for rank in range(count)
    ]


def command(rank: str, count: str, port: str, *arguments: str) -> None:
    """`qexport ...` as one rank."""
    _become(rank, count, port)
    sys.argv = ["qexport", *arguments]
    main()


def gather_statistics(rank: str, count: str, port: str, out: str) -> None:
    """Show each rank its share of a stream, and save what the statistics say then, by rank."""
    _become(rank, count, port)
    with ranks.joined():
        found = statistics()
        for statistic in found.values():
            statistic.update(stream()[ranks.share(ROWS)])
        ranks.combine(list(found.values()))
        torch.save(told(found), Path(out) / f"{rank}.pt")
        torch.save(ranks.first(lambda: f"made by {rank}"), Path(out) / f"{rank}.first")


def _become(rank: str, count: str, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def stream() -> torch.Tensor:
    """float32 [ROWS, FEATURES], a feature without any value."""
    rows = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)).square()
    rows[:, 3] = 0
    return rows


def statistics() -> dict:
    """One empty statistic of every kind."""
    fmt = ActivationFormat(8)
    return {
        "absmax": AbsmaxObserver(), "percentile": PercentileObserver(90.0), "mse": MseObserver(fmt),
        "channels": ChannelAbsmax(), "both": CompositeObserver(ChannelMeanAbs(), ChannelAbsmax()),
        "rows": RowSample(50), "hessian": HessianStatistic("token_norm", 0.5), "clip": TokenClip(fmt),
        "range": RangeAndKernel(MseObserver(fmt)),
    }  # fmt: skip


def told(found: dict) -> dict:
    """What they say."""
    both = found["both"].parts
    return {
        "absmax": found["absmax"].absmax(), "percentile": found["percentile"].absmax(), "mse": found["mse"].absmax(),
        "channels": found["channels"].absmax(), "mean": both[0].mean(), "largest": both[1].absmax(),
        "rows": found["rows"].rows(), "hessian": found["hessian"].value(), "clip": found["clip"].clip(),
        "kernel": found["clip"].kernel(), "range": found["range"].absmax(), "static": found["range"].kernel(0.1),
        "unseen": found["hessian"].unseen(),
    }  # fmt: skip
