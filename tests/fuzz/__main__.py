"""usage, in the folder tests: python -m fuzz [COUNT] [REPORT.md]: runs COUNT (1,000) mutations and writes the report.

python -m fuzz KIND NUMBER runs one again and shows all that it wrote.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from helpers import traces

from . import runner, seeds


def report(runs: list[runner.Run], seconds: float) -> str:
    bad = [run for run in runs if run.result in ("traceback", "hung")]
    failed = "".join(f"\n- {run.kind} {run.number}, {run.command}, {run.what}: {run.result}" for run in bad)
    return f"""# Damaged inputs

{len(runs)} mutations by seeded generators, made by `python -m fuzz` in `tests`, in {seconds / 60:.0f} minutes. Each
is a copy of a tiny model, GGUF file, recipe or export with one file damaged: values of the wrong type, out of range,
huge, NaN, removed, renamed, swapped or nested; files cut off, in another encoding, overwritten with noise; sizes in
binary headers written over. The command runs as typed, in a process with {runner.ROOM >> 30} GiB of addresses more than
it began with and {runner.HUNG} seconds of computing. "Done" is exit code 0, "refused" one sentence on stderr and exit
code 2. Memory counts the libraries, about 350 MB.

{runner.table(runs)}
{failed}"""


def main(*arguments: str) -> None:
    torch.set_num_threads(1)
    # A model whose damage is no matter of its code is traced once.
    with traces.remembered(), tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        made, work = Path(folder) / "seeds", Path(folder) / "work"
        made.mkdir()
        seeds.make(made)
        if len(arguments) == 2 and arguments[0] in runner.KINDS:
            print(runner.run_one(int(arguments[1]), arguments[0], made, work))
            return
        count = int(arguments[0]) if arguments else 1000
        started, runs = time.monotonic(), []
        for run in runner.run_all(runner.numbers(count), made, work):
            runs.append(run)
            if run.result in ("traceback", "hung"):
                print(f"{run.kind} {run.number} {run.command} {run.what}: {run.result}\n{run.said[-1500:]}", flush=True)
        print(text := report(runs, time.monotonic() - started))
        if len(arguments) > 1:
            Path(arguments[1]).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
