"""Recipes calibrated on a device and on the CPU: are the codes the same, and what does each take?

    python samples/calibration_device.py MODEL --device cuda --recipes w4a16_g32 w8a8_static --out device.md

Without MODEL a random one of 4 layers. A row is written as soon as it is known; a recipe that fails has its error in
its row. The last line is a validation of the last export with the float model on the device, beside one on the CPU.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from calibration_speed import Results, same_codes, write_model

import qexport

RECIPES = (
    "w4a16_g32", "w8a8_dyn", "w8a8_static", "nf4", "w4a16_g64_lorc", "llm_int8", "fptq", "w4a16_g64_awq",
    "w4a16_g64_hqq", "w4a16_g64_zq_global", "w4a16_g64_zq_local", "crossquant_w8a8", "compact", "w8a8_static_lae",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--calibration", default="random", help="as qexport export takes it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="in a sample")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--out", type=Path, help="Markdown file")
    given = parser.parse_args()
    results = Results(given.out)
    results.add(f"{given.samples} x {given.tokens} tokens, {given.device}, PyTorch {torch.__version__}", "")
    results.add("| recipe | s on the device | s on the CPU | equal codes |", "| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="qexport-") as scratch:
        model, last = given.model, None
        if model is None:
            model = f"{scratch}/model"
            write_model(Path(model), "135m", 4)
        for recipe in given.recipes:
            asked = qexport.Recipe.load(recipe).with_calibration(samples=given.samples, sequence_length=given.tokens)
            made, seconds = {}, {}
            try:
                for device in (given.device, "cpu"):
                    started, out = time.perf_counter(), Path(scratch) / f"{recipe}-{device}"
                    result = qexport.export(
                        model, asked, out_dir=out, target=given.target, device=device, calibration=given.calibration,
                        offload=given.offload and device != "cpu",
                    )  # fmt: skip
                    seconds[device], made[device] = time.perf_counter() - started, result.folder
                last = made[given.device]
                share = same_codes(last, made["cpu"])
                results.add(f"| {recipe} | {seconds[given.device]:.1f} | {seconds['cpu']:.1f} | {share} |")
            except Exception as error:  # the next one may do
                results.add(f"| {recipe} | {type(error).__name__}: {' '.join(str(error).split())[:300]} | | |")
        for device in (given.device, "cpu") if last is not None else ():
            started, what = time.perf_counter(), f"Validation of {last.name} on {device}"
            try:
                report = qexport.validate(last, model, windows=2, window=64, greedy=8, device=device, provider="cpu")
                took = time.perf_counter() - started
                results.add("", f"{what}: KL {report.logits.kl_mean:.6f}, {took:.1f} s")
            except Exception as error:
                results.add("", f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
