"""Seconds and memory that calibration takes for a layer of a large model's shape, also beside a GPU or another version.

A random Llama of few layers, each of the real shape, is exported in processes of its own, in turns:

    python samples/calibration_speed.py --shape 1b
    python samples/calibration_speed.py --shape 8b --layers 1 --against v0.1.0 --products bfloat16 --runs 3
    python samples/calibration_speed.py --shape 8b --layers 3 --device cuda --cpu-too --out speed.md

`--against` names a commit of this clone, whose code runs from a temporary work tree. Medians over runs and layers, but
for the first layer, in which libraries are loaded, where there are others; CPU seconds are those of all threads. With
`--device`, both sides' codes are compared, and one weight of the shape is quantized on both with the same Hessian. The
bound is the arithmetic that a layer needs over the rate of a float32 matrix product on the device, as calibration uses
it: PyTorch takes no TF32 for it unless told to. `--out` is written again after every measurement.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

ROOT = Path(__file__).parents[1]
# hidden size, intermediate size, attention heads, key and value heads
SHAPES = {
    "tiny": (64, 128, 4, 2),
    "135m": (576, 1536, 9, 3),
    "1b": (2048, 8192, 32, 8),
    "8b": (4096, 14336, 32, 8),
    "70b": (8192, 28672, 64, 8),
}
CHILD = """
import json, resource, sys, time
import torch
options = json.loads(sys.argv[1])
torch.set_num_threads(options["threads"])
from qexport import Recipe, export
marks = []
def progress(stage, what, done, total):
    if stage == "quantize":
        marks.append((what, time.process_time(), time.perf_counter()))
recipe = Recipe.load(options["recipe"])
given = {"products": options["products"]} if options.get("products") else {}
given |= {"source": "random", "samples": options["samples"], "sequence_length": options["tokens"]}
recipe = recipe.with_calibration(**given)
device = {} if options["device"] == "cpu" else {"device": options["device"], "offload": options["offload"]}
export(options["model"], recipe, out_dir=options["out"], progress=progress, **device)
layers = [(b[1] - a[1], b[2] - a[2]) for a, b in zip(marks, marks[1:]) if ".layers." in a[0]]
layers = layers[1:] or layers
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
there = torch.cuda.max_memory_allocated() if options["device"].startswith("cuda") else 0
cpu, wall = (sorted(layer[i] for layer in layers)[len(layers) // 2] for i in (0, 1))
print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "there": there}))
"""
BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8}


def write_model(folder: Path, shape: str, layers: int, *, device: str = "cpu", **more: int) -> None:
    """A random Llama in bfloat16; device: where its weights are drawn, more: of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=True, **{"vocab_size": 512} | more,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        LlamaForCausalLM(config).cpu().save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


@contextmanager
def tree_of(commit: str | None):
    """The folder whose code runs: this clone, or a work tree of another commit."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            (tree / "qexport/passes").symlink_to(tree / "passes")  # where an installed package has them
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def measured(tree: Path, options: dict) -> dict[str, float]:
    """One export by the code of a tree."""
    command = [sys.executable, "-c", CHILD, json.dumps(options)]
    path = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def linears(shape: str) -> list[tuple[list[int], int]]:
    """What a layer's linears read, by outputs of each and inputs."""
    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    kv = hidden // heads * kv_heads
    return [([hidden, kv, kv], hidden), ([hidden], hidden), ([intermediate, intermediate], hidden),
            ([hidden], intermediate)]  # fmt: skip


def needed(shape: str, tokens: int, length: int) -> float:
    """FLOPs that GPTQ of a layer needs: two forward passes, half of every Hessian, its factor, the rounding itself."""
    hidden, total = SHAPES[shape][0], 0
    for outputs, k in linears(shape):
        n = sum(outputs)
        total += 2 * 2 * tokens * n * k + tokens * k * k + 2 * k**3 // 3 + n * k * k
    return total + 2 * 4 * tokens * length * hidden


def product_rate(device: torch.device) -> float:
    """FLOP/s of a product of float32 matrices, as calibration multiplies them."""
    size = 8192 if device.type == "cuda" else 2048
    a, times = torch.randn(size, size, device=device), []
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def one_weight(shape: str, tokens: int, device: torch.device) -> str:
    """The same weight and inputs on both: seconds, share of equal codes, ratio of the objectives."""
    from qexport.quant.formats import Scheme
    from qexport.quant.gptq import gptq_quantize
    from qexport.quant.hessian import HessianStatistic

    hidden, random = SHAPES[shape][0], torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, hidden, generator=random) * torch.rand(hidden, generator=random).add_(0.1)
    weight = torch.randn(hidden, hidden, generator=random) / hidden**0.5
    fmt, found = Scheme.parse("w4a16_g32").weight, []
    for where in (torch.device("cpu"), device, device):  # the first time there, libraries are loaded
        started, statistic = time.perf_counter(), HessianStatistic()
        for part in rows.to(where).split(2048):
            statistic.update(part)
        hessian = statistic.value()
        float(hessian[0, 0])
        summed = time.perf_counter() - started
        quantized = gptq_quantize(weight.to(where), hessian, fmt, act_order=False)
        codes, values = quantized.codes.cpu(), quantized.dequantize().cpu().double()
        found.append((summed, time.perf_counter() - started, codes, values, hessian.cpu().double()))
    here, there = found[0], found[2]
    lost = [float(((off @ here[4]) * off).sum()) for off in (weight.double() - here[3], weight.double() - there[3])]
    equal = float((here[2] == there[2]).double().mean())
    return (
        f"A weight [{hidden}, {hidden}] and its Hessian of {tokens} tokens: {here[1]:.2f} s on the CPU ({here[0]:.2f} s"
        f" for the Hessian), {there[1]:.2f} s on {device} ({there[0]:.2f} s); {equal:.4%} of the codes are equal, and "
        f"the objective is {lost[1] / lost[0]:.6f} of the CPU's."
    )


def how_strips_run(device: torch.device) -> str:
    """Whether GPTQ has its kernel on the device, and why not."""
    from qexport.quant import strips

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    strips.logger.addHandler(handler)
    strips.logger.setLevel(logging.INFO)
    strips.compiled.cache_clear()
    if device.type != "cuda":
        return "GPTQ rounds in operators of PyTorch."
    with_kernel = strips.compiled(torch.empty(1, device=device).device) is not None
    return "GPTQ rounds strips in one kernel." if with_kernel else " ".join(said or ["The kernel does not work."])


def same_codes(first: Path, second: Path) -> str:
    """How many codes of the weights of two exports are equal, by layer."""
    from qexport.runtime.tensors import tensor_of

    pair = [{t.name: t for t in onnx.load(f / "model.onnx", load_external_data=False).graph.initializer}
            for f in (first, second)]  # fmt: skip
    shares: dict[str, list[tuple[int, int]]] = {}
    for name, tensor in pair[0].items():
        if tensor.data_type in BITS and np.prod(tensor.dims) >= 1024 and name in pair[1]:
            one, other = (np.asarray(tensor_of(t, f)).astype(np.int16)
                          for t, f in ((tensor, first), (pair[1][name], second)))  # fmt: skip
            layer = ".".join(name.split(".")[:3]) if ".layers." in name else "elsewhere"
            shares.setdefault(layer, []).append((int((one == other).sum()), one.size))
    return "; ".join(
        f"{layer} {sum(s for s, _ in found) / sum(n for _, n in found):.4%}" for layer, found in shares.items()
    )


class Results:
    """Lines that are printed, and written to a file, as soon as they are known."""

    def __init__(self, out: Path | None):
        self._out, self._lines = out, []

    def add(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self._lines += lines
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text("\n".join(self._lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", default="w4a16_g32")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="in a sample")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--against", help="a commit of this clone")
    parser.add_argument("--products", choices=("float32", "bfloat16"), help="of this clone's code; else the recipe's")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--offload", action="store_true", help="activations wait on the host")
    parser.add_argument("--cpu-too", action="store_true", help="beside --device")
    parser.add_argument("--out", type=Path, help="Markdown file")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    options = {key: getattr(given, key) for key in ("recipe", "samples", "tokens", "threads", "offload")}
    device, cuda = torch.device(given.device), given.device.startswith("cuda")
    sides = [("here" if given.device == "cpu" else given.device, None, given.device)]
    if given.cpu_too and given.device != "cpu":
        sides.append(("cpu", None, "cpu"))
    if given.against:
        sides.append((given.against, given.against, "cpu"))
    results, total = Results(given.out), given.samples * given.tokens
    how = f" with {given.products} products here" if given.products else ""
    name = f"{torch.cuda.get_device_name(device)}, " if cuda else ""
    results.add(
        f"{given.recipe}{how}, a layer of {given.shape}'s shape, {given.samples} x {given.tokens} tokens; {name}"
        f"{given.threads} threads, PyTorch {torch.__version__}", "",
    )  # fmt: skip
    rates = {where: product_rate(torch.device(where)) for where in dict.fromkeys(side[2] for side in sides)}
    flops = needed(given.shape, total, given.tokens)
    results.add(*(f"A float32 product on {where}: {rate / 1e12:.2f} TFLOP/s; GPTQ needs {flops / 1e12:.2f} TFLOP a "
                  f"layer, {flops / rate:.2f} s." for where, rate in rates.items()), "")  # fmt: skip
    if given.device != "cpu":
        results.add(one_weight(given.shape, total, device), how_strips_run(device), "")
    columns = ("code", "wall s a layer", "CPU s", "share of the bound", "peak on the host, GB", "on the device, GB")
    results.add(f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}")
    found: dict[str, list[dict[str, float]]] = {side[0]: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="qexport-") as scratch:
        model = Path(scratch) / "model"
        write_model(model, given.shape, given.layers)
        made = {side[0]: Path(scratch) / str(number) for number, side in enumerate(sides)}
        for run in range(given.runs):
            for label, commit, where in sides:
                with tree_of(commit) as tree:
                    out = made[label] / str(run)
                    asked = {"model": str(model), "out": str(out), "device": where}
                    asked["products"] = given.products if commit is None else None
                    found[label].append(measured(tree, options | asked))
                print(f"run {run + 1} of {given.runs}, {label}: {found[label][-1]['wall']:.1f} s", file=sys.stderr)
                if run + 1 == given.runs:
                    cpu, wall, peak, there = (
                        statistics.median(r[key] for r in found[label]) for key in ("cpu", "wall", "peak", "there")
                    )
                    share = f"{flops / rates[where] / wall:.1%}"
                    results.add(
                        f"| {label} | {wall:.2f} | {cpu:.1f} | {share} | {peak / 1e9:.2f} | {there / 1e9:.2f} |"
                    )
        if given.against:
            here, there = (statistics.median(r["cpu"] for r in found[s]) for s in (sides[0][0], given.against))
            results.add("", f"CPU seconds, here over {given.against}: {here / there:.2f}")
        if "cpu" in made and given.device != "cpu":
            results.add("", f"Equal codes: {same_codes(made[given.device] / '0', made['cpu'] / '0')}")


if __name__ == "__main__":
    main()
