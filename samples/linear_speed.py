"""What every scheme makes of the speed of linears on this machine, beside float32, in turns.

    python samples/linear_speed.py [scheme ...] [--rows 1 128] [--width 1536]

Linears of one width, one behind the other, random weights; medians of the processor time of the turns, and the speed
relative to float32, above 1 is faster. What is slower than float is worth a warning, which `qexport inspect` gives.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import qexport
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.session import open_session

SCHEMES = (
    "float", "w4a16_g32", "w4a16_g128", "w4a16_pc", "w8a16_g32", "w8a16_pc", "w2a16_g64", "nf4", "fp4", "w8a8_dyn",
    "w8a8_static", "w4a8_g128",
)  # fmt: skip


def recipe_of(scheme: str, accuracy_level: int) -> Recipe:
    calibration = CalibrationSpec(source="random", samples=2, sequence_length=8)
    return Recipe(scheme=scheme, accuracy_level=accuracy_level, calibration=calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accuracy-level", type=int, default=4)
    parser.add_argument("--form", default="native")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(given.width, given.width) for _ in range(given.layers)))
    schemes = list(dict.fromkeys(["float", *given.schemes]))
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for scheme in schemes:
            out = Path(folder) / scheme
            qexport.export(
                model, recipe_of(scheme, given.accuracy_level), out_dir=out, form=given.form,
                example_inputs=(torch.randn(1, 4, given.width),), dynamic_shapes={"input": {1: "rows"}},
                calibration=[(torch.randn(1, 4, given.width),)],
            )  # fmt: skip
            sessions[scheme] = open_session(out, threads=given.threads)
        for rows in given.rows:
            x = np.random.default_rng(0).standard_normal((1, rows, given.width)).astype(np.float32)
            took = {scheme: [] for scheme in schemes}
            for turn in range(given.turns + 1):
                for scheme, session in sessions.items():
                    (name,) = (value.name for value in session.get_inputs())
                    start = time.process_time()
                    for _ in range(max(1, 32 // rows)):
                        session.run(None, {name: x})
                    if turn:  # the first one warms up
                        took[scheme].append(time.process_time() - start)
            medians = {scheme: statistics.median(values) for scheme, values in took.items()}
            for scheme, value in medians.items():
                print(f"rows {rows:4d}  {scheme:14s} {medians['float'] / value:6.2f} of float32's speed", flush=True)


if __name__ == "__main__":
    main()
