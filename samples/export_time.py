"""Seconds from a checkpoint to a 4-bit ONNX folder: qexport beside onnxruntime-genai's model builder, in turns.

    python samples/export_time.py MODEL [--builder PYTHON] [--runs 3]

MODEL is a local folder. PYTHON is an interpreter of an environment in which
`python -m onnxruntime_genai.models.builder` works (its needs clash with others: give it an environment of its own).
Whole processes are timed, imports included; the ratio is that of the medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds(command: list[str]) -> float:
    """Wall time of a process that has to succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--builder", default=sys.executable, help="interpreter that has onnxruntime-genai's builder")
    parser.add_argument("--recipe", default="w4a16_g32_rtn")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    ours, theirs = [], []
    for run in range(given.runs + 1):  # the first pair warms the disk cache and is not counted
        with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
            out = Path(folder)
            export = [sys.executable, "-m", "qexport", "export", given.model, "-o", str(out / "ours")]
            mine = seconds([*export, "--recipe", given.recipe])
            build = [given.builder, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
            other = seconds([*build, "-i", given.model, "-o", str(out / "built"), "-c", str(out / "cache")])
        print(f"run {run}: qexport {mine:.1f} s, builder {other:.1f} s", file=sys.stderr)
        if run:
            ours.append(mine)
            theirs.append(other)
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(f"medians of {given.runs}: qexport {given.recipe} {mine:.1f} s, builder int4 {other:.1f} s")
    print(f"ratio {mine / other:.2f}")


if __name__ == "__main__":
    main()
