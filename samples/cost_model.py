"""Hours that the calibration of large models takes, by the cost model, and the model beside what is measured here.

    python samples/cost_model.py
    python samples/cost_model.py --check 1b --threads 1 [--products bfloat16]

The first prints hours for the default way of calibrating (GPTQ in groups of 32, 32 x 256 tokens and 512 x 2048) on
stated devices; several of them share samples and linears out, as with torchrun. Behind it stands what was measured
beside a GPU. The second exports random layers of a
real shape and compares processor seconds, which do not grow with what else the machine does.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from calibration_speed import SHAPES, linears, measured, write_model

from qexport.cost.estimate import estimated
from qexport.cost.machine import Machine, seconds, share_reached
from qexport.cost.machine import measured as machine_of
from qexport.cost.work import Data, Effort, Reading, block_work
from qexport.formatting import duration

LAYERS = {"8b": 32, "70b": 80, "405b": 126}
WIDER = {"405b": (16384, 53248, 128, 8)}
# float32 FLOP/s without TF32 (of the H200 as measured), bytes/s of memory, bytes/s to another device
DEVICES = {
    "a CPU of 64 cores": (3e12, 3e11, 1e10), "an A100": (19.5e12, 2.0e12, 3e11), "an H200": (50e12, 4.8e12, 4.5e11),
}  # fmt: skip
# A layer of 1B's shape, 32 x 256 tokens (samples/results/gpu.md), and the seconds that it took.
MEASURED = {
    "an H200": (Machine(50.6e12, 4.8e12), 1.33),
    "the CPU beside it, 16 threads": (Machine(1.23e12, 2e11, reached=share_reached(16)), 9.09),
}
WORK = {"32 x 256": (32, 256), "512 x 2048": (512, 2048)}
EFFORT = Effort(passes=2, hessians=True)


def readings(shape: str) -> list[Reading]:
    return [Reading(inputs, tuple(outputs)) for outputs, inputs in linears(shape)]


def table() -> None:
    """Hours by model, device, number of them and calibration data."""
    print("| model | device | tokens | 1 | 8 | 64 |\n| --- | --- | --- | --- | --- | --- |")
    for shape, layers in LAYERS.items():
        blocks = {str(layer): readings(shape) for layer in range(layers)}
        for device, (flops, bandwidth, link) in DEVICES.items():
            reached = share_reached(64) if "CPU" in device else Machine.reached
            for name, (samples, length) in WORK.items():
                data = Data(samples, length, 4, SHAPES[shape][0])
                taken = [
                    estimated(blocks, data, EFFORT, Machine(flops, bandwidth, count, link, reached), 0).seconds / 3600
                    for count in (1, 8, 64)
                ]
                print(f"| {shape} | {device} | {name} | {' | '.join(f'{hours:.2f}' for hours in taken)} |")


def beside_gpu() -> None:
    """The rows that numbers of the model come from."""
    print("\n| machine | FLOP/s of a product | predicted, s | measured, s |\n| --- | --- | --- | --- |")
    work = block_work(readings("1b"), Data(32, 256, 4, SHAPES["1b"][0]), EFFORT)
    for name, (machine, found) in MEASURED.items():
        print(f"| {name} | {machine.flops / 1e12:.3g}e12 | {seconds(work, machine):.2f} | {found} |")


def check(given: argparse.Namespace) -> None:
    """Processor seconds of a layer, predicted and measured."""
    torch.set_num_threads(given.threads)
    machine = machine_of(torch.device("cpu"), time.process_time, given.products)
    data = Data(given.samples, given.tokens, 4, SHAPES[given.check][0])
    predicted = seconds(block_work(readings(given.check), data, EFFORT), machine)
    options = {
        "recipe": "w4a16_g32", "products": given.products, "samples": given.samples, "tokens": given.tokens,
        "threads": given.threads,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        write_model(Path(folder) / "model", given.check, 2)
        options |= {"model": f"{folder}/model", "out": f"{folder}/out", "device": "cpu", "offload": False}
        found = measured(Path(__file__).parents[1], options)["cpu"]
    print(
        f"{machine.flops / 1e9:.0f} GFLOP ({machine.streamed / 1e9:.0f} as {given.products}) and "
        f"{machine.bandwidth / 1e9:.1f} GB a processor second; a layer of "
        f"{given.check}'s shape, {given.samples} x {given.tokens} tokens: predicted {duration(predicted)}, measured "
        f"{duration(found)}, {predicted / found:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", choices=SHAPES, help="a shape to measure")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--products", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    SHAPES.update(WIDER)
    if given.check:
        check(given)
    else:
        table()
        beside_gpu()


if __name__ == "__main__":
    main()
