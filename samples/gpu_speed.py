"""How fast files for CUDA are on a GPU, beside a float16 file of the same model: prompts, steps, memory, variants.

    python samples/gpu_speed.py [--models smollm2=FOLDER 1b 8b] [--rows '1b/*'] [--seconds 180] [--out FILE]

A model is NAME=PATH, or the shape of a large one with random weights: 1b, or 8b in 8 of its 32 layers (its time grows
with them). Everything is exported first, several at once, then measured one after another, each file in a process of
its own. Variants of a file: steps without a CUDA graph, without XQA, with fpA_intB. The share of the bandwidth is
the bytes of weights that a token needs, times tokens a second, over what copying within the device's memory reaches.
With --text a model with a path is compared with transformers in float16 on the same GPU. Every finished row is written
at once; --provider cpu rehearses without a GPU.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

import numpy as np
from calibration_speed import write_model
from gpu_check import bytes_read, compared, copy_bandwidth

from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import CPU, CUDA
from qexport.runtime.decoder import open_decoder
from qexport.targets.kernels.fpa_intb import ENTRY

LAYERS = {"tiny": 2, "1b": 16, "8b": 8}  # of the shapes
FLOAT = "scheme: w8a8_dyn\nlm_head: float\noverrides: [{match: '*', scheme: float}]\n"
RTN = "scheme: {}\nlm_head: {}\nweights: {{method: rtn}}\n"
RTN += "calibration: {{source: random, samples: 4, sequence_length: 64}}\n"
RECIPES = {
    "float16": FLOAT,
    **{name: RTN.format(name, name) for name in ("w4a16_g32", "w4a16_g128", "w4a16_g32_asym", "w8a16_g32", "w8a8_dyn",
                                                 "w8a8_static", "w4a8", "nf4", "w2a16_g64")},
    "w4a16_g32, kv8": RTN.format("w4a16_g32", "w4a16_g32") + "kv_cache: {bits: 8}\n",
    "w4a16_g32 head float": RTN.format("w4a16_g32", "float"),
    "compact": "compact",
}  # fmt: skip
ROWS = {
    "path": tuple(RECIPES),
    "shape": ("float16", "w4a16_g32", "w4a16_g128", "w8a16_g32", "w8a8_dyn", "w8a8_static", "w4a16_g32, kv8"),
}
VARIANTS = {
    "": {}, "no CUDA graph": {"records": False}, "no XQA": {"env": {"ORT_ENABLE_XQA": "0"}},
    "fpA_intB": {"entries": {ENTRY: "1"}},
}  # fmt: skip
VARIED = {
    "float16": ("", "no CUDA graph", "no XQA"), "w4a16_g32": tuple(VARIANTS), "w8a16_g32": ("", "fpA_intB"),
    "w4a16_g32, kv8": ("", "no XQA"),
}  # fmt: skip
PROMPTS, PASTS, STEPS = (128, 512, 2048), (128, 2048), 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1b", "8b"])
    parser.add_argument("--rows", nargs="+", default=["*"], help="shell patterns of model/recipe")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path, help="UTF-8 text for the recipes that calibrate")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exports", type=int, default=4, help="exports at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row is begun after so many")
    parser.add_argument("--work", type=Path, help="folder of models and exports, kept")
    parser.add_argument("--only", choices=("export", "measure"))
    parser.add_argument("--out", type=Path, default=Path("gpu_speed.jsonl"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print("RESULT", json.dumps(measured(json.loads(given.child))), flush=True)
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qexport-") as place:
        work = given.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        jobs = list(chosen(given))
        if given.only != "measure":
            export_all(jobs, work, given)
        if given.only != "export":
            measure_all(jobs, work, given, start)


def chosen(given: argparse.Namespace):
    """(model, path or None, recipe) of every row."""
    for model in given.models:
        name, _, path = model.partition("=")
        for recipe in ROWS["path" if path else "shape"]:
            if any(fnmatchcase(f"{name}/{recipe}", pattern) for pattern in given.rows):
                yield name, path or None, recipe


def folder_of(work: Path, model: str, recipe: str) -> Path:
    return work / f"{model}-{recipe}".replace(", ", "-").replace(" ", "-")


def export_all(jobs: list, work: Path, given: argparse.Namespace) -> None:
    for model in dict.fromkeys(name for name, path, _ in jobs if path is None):
        device = "cpu" if given.provider == "cpu" else "cuda"
        write_model(work / model, model, LAYERS[model], device=device, vocab_size=32768, max_position_embeddings=8192)

    def export(job: tuple) -> str:
        model, path, recipe = job
        out, begun = folder_of(work, model, recipe), time.monotonic()
        text = RECIPES[recipe]
        if "\n" in text:
            (work / f"{out.name}.yaml").write_text(text)
            text = str(work / f"{out.name}.yaml")
        main_of = "from qexport.cli import main; main()"
        command = [sys.executable, "-c", main_of, "export", path or str(work / model), "-r", text, "-o", str(out),
                   "--target", "cuda", "--overwrite"]  # fmt: skip
        if given.calibration and text in RECIPES.values():
            command += ["--calibration", str(given.calibration)]
        done = subprocess.run(command, capture_output=True, text=True)
        last = "" if done.returncode == 0 else done.stderr[-500:]
        return f"exported {model}/{recipe}: {time.monotonic() - begun:.0f} s {last}"

    with ThreadPoolExecutor(given.exports) as pool:
        for line in pool.map(export, jobs):
            print(line, flush=True)


def measure_all(jobs: list, work: Path, given: argparse.Namespace, start: float) -> None:
    provider = CPU if given.provider == "cpu" else CUDA
    bandwidth = copy_bandwidth("cpu" if provider == CPU else "cuda")
    print(f"copying reaches {bandwidth / 1e9:,.0f} GB/s", flush=True)
    plain, floats = {}, {}
    with given.out.open("w") as file:
        for model, path, recipe in jobs:
            folder = folder_of(work, model, recipe)
            for variant in VARIED.get(recipe, ("",)):
                if time.monotonic() - start > given.seconds:
                    print(f"no time for {model}/{recipe} {variant}")
                    continue
                asked = {"folder": str(folder), "provider": provider, "repeats": given.repeats, **VARIANTS[variant]}
                row = {"model": model, "recipe": recipe, "variant": variant, **in_process(asked)}
                if "failed" not in row:
                    row["bytes"] = bytes_read(folder)
                    row["bandwidth"] = {n: rate * row["bytes"] / bandwidth for n, rate in row["decode"].items()}
                    if (recipe, variant) == ("float16", ""):
                        floats[model] = row
                    if path and given.text and not variant:
                        try:
                            if model not in plain:
                                plain[model] = windows(path, given.text, provider)
                            row["kl, top-1, worst"] = against(plain[model], folder, provider)
                        except Exception as error:  # of one row; its speed is worth knowing
                            row["kl, top-1, worst"] = f"failed: {str(error)[-300:]}"
                print(json.dumps(row), file=file, flush=True)
                print(line_of(row, floats.get(model)), flush=True)


def line_of(row: dict, base: dict | None) -> str:
    title = f"{row['model']}/{row['recipe']} {row['variant']}".strip()
    if "failed" in row:
        return f"{title}: FAILED {row['failed'][-400:]}"

    def rates(kind: str) -> str:
        return " ".join(
            f"{n}:{rate:,.0f}" + (f"({rate / base[kind][n]:.2f}x)" if base else "") for n, rate in row[kind].items()
        )

    share = " ".join(f"{100 * value:.0f}%" for value in row["bandwidth"].values())
    return (
        f"{title}: prefill {rates('prefill')} | decode {rates('decode')} | {share} of bandwidth"
        f" | recorded {row['recorded']} | load {row['load']:.1f} s, {row['memory'] / 1e6:,.0f} MB "
        f"{row.get('kl, top-1, worst', '')}"
    )


def in_process(asked: dict) -> dict:
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(asked)], capture_output=True, text=True,
                          env={**os.environ, **asked.get("env", {})}, timeout=120)  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else {"failed": f"{done.returncode}: {done.stderr[-600:]}"}


def measured(asked: dict) -> dict:
    """Rates of one file in this process."""
    folder, longest = Path(asked["folder"]), max(*PROMPTS, *PASTS) + STEPS
    manifest = manifests.load(folder)
    manifest = manifest.model_copy(update={"session": {**manifest.session, **asked.get("entries", {})}})
    before, begun = free_memory(asked["provider"]), time.perf_counter()
    decoder = open_decoder(folder, manifest, threads=1, provider=asked["provider"], max_length=longest,
                           records=asked.get("records"))  # fmt: skip
    load = time.perf_counter() - begun
    ids = np.random.default_rng(0).integers(0, manifest.settings["vocab_size"], (1, longest))
    prefill = {n: [] for n in PROMPTS}
    decode = {n: [] for n in PASTS}
    for turn in range(asked["repeats"] + 1):
        for n in sorted({*PROMPTS, *PASTS}):
            decoder.reset()
            begun = time.perf_counter()
            decoder.run(ids[:, :n])
            took = time.perf_counter() - begun
            if turn and n in prefill:
                prefill[n].append(took)
            for i in range(n, n + STEPS if n in decode else n):
                begun = time.perf_counter()
                decoder.run(ids[:, i : i + 1])
                if turn:
                    decode[n].append(time.perf_counter() - begun)
    return {
        "load": load, "memory": before - free_memory(asked["provider"]), "recorded": decoder.recorded,
        "prefill": {str(n): n / median(seconds) for n, seconds in prefill.items()},
        "decode": {str(n): 1 / median(seconds) for n, seconds in decode.items()},
    }  # fmt: skip


def free_memory(provider: str) -> int:
    if provider == CPU:
        return 0
    runtime, free, total = ctypes.CDLL("libcudart.so.13"), ctypes.c_size_t(), ctypes.c_size_t()
    runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return free.value


def windows(path: str, text: Path, provider: str):
    """Token windows of a text and the float model's logits on them."""
    import torch
    from transformers import AutoModelForCausalLM

    from qexport.api.stages.capturing import capture_model
    from qexport.validation.text import choose_text

    captured = capture_model(path)
    chosen_text = choose_text(captured, str(text), 8, 512, lambda *_: None)
    source, device = captured.folder.path, "cpu" if provider == CPU else "cuda"
    given = {"gguf_file": Path(path).name} if path.endswith(".gguf") else {}
    model = AutoModelForCausalLM.from_pretrained(Path(path).parent if given else source, dtype=torch.float16, **given)
    model = model.to(device).eval()
    with torch.no_grad():
        logits = [model(ids[None].to(device)).logits[0].float().cpu() for ids in chosen_text.windows]
    return chosen_text.windows, logits


def against(plain, folder: Path, provider: str) -> str:
    from qexport.validation.logits import deployed_logits

    ids, want = plain
    run = deployed_logits(folder, manifests.load(folder), 512, provider=provider)
    return compared(want, [run(window) for window in ids])


if __name__ == "__main__":
    main()
