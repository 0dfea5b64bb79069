"""How small a linear may be before it runs slower with codes than in floats: by inputs, outputs and rows, in turns.

    python samples/small_linears.py [--schemes w8a8_static w8a8_dyn] [--inputs 16 64 256] [--outputs 2 8 32 128]

Files of four linears of one shape beside each other, each with an input of its own, random weights; the medians over
pairs of runs of the processor time of float32 over that of the scheme: above 1 is faster. Inputs and outputs are bound,
so that a run costs little more than its operators.
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

SCHEMES = ("w8a8_static", "w8a8_dyn", "w4a16_g32", "w8a16_g32")
LEAST = 2e-3  # seconds of a measurement
COPIES = 4


class Beside(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linears = torch.nn.ModuleList(torch.nn.Linear(inputs, outputs) for _ in range(COPIES))

    def forward(self, a, b, c, d):
        return tuple(linear(x) for linear, x in zip(self.linears, (a, b, c, d), strict=True))


def files(place: Path, inputs: int, outputs: int, schemes: list[str]) -> dict[str, object]:
    """Sessions of one thread by scheme, float first."""
    module, sessions = Beside(inputs, outputs), {}
    given = tuple(torch.randn(1, 8, inputs) for _ in range(COPIES))
    calibration = CalibrationSpec(source="random", samples=2, sequence_length=8)
    for scheme in ("float", *schemes):
        out = place / f"{scheme}-{inputs}-{outputs}"
        qexport.export(
            module, Recipe(scheme=scheme, weights={"method": "rtn"}, calibration=calibration), out_dir=out,
            example_inputs=given, dynamic_shapes={name: {1: "rows"} for name in "abcd"}, calibration=[given],
        )  # fmt: skip
        sessions[scheme] = open_session(out, threads=1)
    return sessions


def binding_of(session, rows: int, inputs: int, outputs: int):
    import onnxruntime as ort

    binding = session.io_binding()
    random = np.random.default_rng(0)
    for value in session.get_inputs():
        x = random.standard_normal((1, rows, inputs)).astype(np.float32)
        binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(x))
    for value in session.get_outputs():
        y = np.zeros((1, rows, outputs), np.float32)
        binding.bind_ortvalue_output(value.name, ort.OrtValue.ortvalue_from_numpy(y))
    return binding


def ratios(sessions: dict[str, object], inputs: int, outputs: int, rows: int, turns: int) -> dict[str, float]:
    runs = {name: (session, binding_of(session, rows, inputs, outputs)) for name, session in sessions.items()}

    def seconds(name: str, count: int) -> float:
        session, binding = runs[name]
        began = time.process_time()
        for _ in range(count):
            session.run_with_iobinding(binding)
        return time.process_time() - began

    for name in runs:
        seconds(name, 3)
    count = max(3, round(LEAST / (seconds("float", 10) / 10 + 1e-7)))
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in runs if turn % 2 else reversed(runs):
            took[name].append(seconds(name, count))
    return {
        name: statistics.median(f / t for f, t in zip(took["float"], took[name], strict=True))
        for name in list(runs)[1:]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--inputs", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--outputs", type=int, nargs="+", default=[2, 8, 16, 32, 128, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    columns = [f"{scheme}, {rows}" for scheme in given.schemes for rows in given.rows]
    print(f"| inputs, outputs | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for inputs in given.inputs:
        for outputs in given.outputs:
            with tempfile.TemporaryDirectory() as place:
                sessions = files(Path(place), inputs, outputs, given.schemes)
                by_rows = [ratios(sessions, inputs, outputs, rows, given.turns) for rows in given.rows]
                cells = [f"{found[scheme]:.2f}" for scheme in given.schemes for found in by_rows]
                print(f"| {inputs}, {outputs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
