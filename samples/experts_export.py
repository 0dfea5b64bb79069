"""What an export of a mixture takes whose checkpoint holds every expert apart: time, memory, temporary files.

A random Qwen3-MoE of few layers, each of the shape of Qwen3-30B-A3B's (128 experts, bfloat16, under the names of the
files on the Hub), is exported in a process of its own, also by the code of another commit:

    python samples/experts_export.py
    python samples/experts_export.py --recipe w4a16_g128_rtn --against v0.1.0
    python samples/experts_export.py --layers 1 --experts 8 --hidden 256 --inner 128

Seconds of capture are those of the whole model; memory is the peak of the process, libraries included; temporary files
are the most that lay in TMPDIR at once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from calibration_speed import tree_of
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

CHILD = """
import json, os, sys, tempfile, threading, time
import torch
options = json.loads(sys.argv[1])
torch.set_num_threads(options["threads"])
from qexport import Recipe, export
most, done = 0, threading.Event()
def bytes_in(folder):
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:
                pass
    return total
def watch():
    global most
    while not done.wait(0.2):
        most = max(most, bytes_in(tempfile.gettempdir()))
watcher = threading.Thread(target=watch)
watcher.start()
def peak():
    # Of this process alone: what getrusage says is at least what the process had that started this one.
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
base = peak()
marks = []
def progress(stage, what, number, total):
    if stage == "quantize":
        marks.append((what, time.perf_counter()))
recipe = Recipe.load(options["recipe"])
recipe = recipe.with_calibration(source="random", samples=options["samples"], sequence_length=options["tokens"])
cpu, wall = time.process_time(), time.perf_counter()
try:
    made = export(options["model"], recipe, out_dir=options["out"], progress=progress)
finally:
    done.set()
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
layers = sorted(after - before for (what, before), (_, after) in zip(marks, marks[1:]) if ".layers." in what)
print(json.dumps({"seconds": made.seconds, "cpu": cpu, "wall": wall, "base": base, "temporary": most,
                  "layer": layers[len(layers) // 2], "peak": peak()}))
"""


def write_model(folder: Path, given: argparse.Namespace) -> int:
    """A random model, a file for each layer; returns the number of parameters of a layer."""
    config = Qwen3MoeConfig(
        vocab_size=given.vocab, hidden_size=given.hidden, moe_intermediate_size=given.inner,
        intermediate_size=given.inner, num_hidden_layers=given.layers, num_attention_heads=given.hidden // 64,
        num_key_value_heads=max(given.hidden // 512, 1), head_dim=128, num_experts=given.experts,
        num_experts_per_tok=given.chosen, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    random, files, parameters = torch.Generator().manual_seed(0), {}, 0

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random).mul_(columns**-0.5).to(torch.bfloat16)

    def write(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name)
        files.update(dict.fromkeys(tensors, name))
        return sum(tensor.numel() for tensor in tensors.values())

    wide, narrow = config.num_attention_heads * 128, config.num_key_value_heads * 128
    ones = lambda size: torch.ones(size, dtype=torch.bfloat16)  # noqa: E731
    for layer in range(given.layers):
        hidden, attention = given.hidden, "self_attn"
        parts = {
            "input_layernorm.weight": ones(hidden), "post_attention_layernorm.weight": ones(hidden),
            f"{attention}.q_norm.weight": ones(128), f"{attention}.k_norm.weight": ones(128),
            f"{attention}.q_proj.weight": matrix(wide, hidden), f"{attention}.k_proj.weight": matrix(narrow, hidden),
            f"{attention}.v_proj.weight": matrix(narrow, hidden), f"{attention}.o_proj.weight": matrix(hidden, wide),
            "mlp.gate.weight": matrix(given.experts, hidden),
        }  # fmt: skip
        for expert in range(given.experts):
            for name, shape in (("gate", (given.inner, given.hidden)), ("up", (given.inner, given.hidden)),
                                ("down", (given.hidden, given.inner))):  # fmt: skip
                parts[f"mlp.experts.{expert}.{name}_proj.weight"] = matrix(*shape)
        parts = {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
        parameters = write(f"model-{layer:05d}.safetensors", parts)
    ends = {"model.embed_tokens.weight": matrix(given.vocab, given.hidden), "model.norm.weight": ones(given.hidden),
            "lm_head.weight": matrix(given.vocab, given.hidden)}  # fmt: skip
    write("model-ends.safetensors", ends)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def measured(commit: str | None, model: Path, work: Path, given: argparse.Namespace) -> dict:
    """One export by the code of a commit, with a folder of its own for temporary files."""
    temporary = work / "temporary"
    temporary.mkdir(exist_ok=True)
    options = {key: getattr(given, key) for key in ("recipe", "samples", "tokens", "threads")}
    options |= {"model": str(model), "out": str(work / f"out-{commit}")}
    with tree_of(commit) as tree:
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(options)], capture_output=True, text=True, cwd=tree,
            env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary)},
        )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4a16_g32")
    for name, default in (("layers", 2), ("experts", 128), ("chosen", 8), ("hidden", 2048), ("inner", 768),
                          ("vocab", 512), ("samples", 32), ("tokens", 256)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--against", help="a commit of this clone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        work, model = Path(folder), Path(folder) / "model"
        parameters = write_model(model, given)
        print(
            f"{given.recipe}, {given.layers} layers of {parameters / 1e6:.0f} million parameters, {given.experts} "
            f"experts of {given.inner}, {given.chosen} chosen, hidden {given.hidden}; calibration, where needed: "
            f"{given.samples} x {given.tokens} random tokens\n"
        )
        columns = ("code", "capture, s", "a layer, s", "all, s", "CPU s", "peak memory, GB", "temporary files, GB")
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        for commit in [None, *([given.against] if given.against else [])]:
            found = measured(commit, model, work, given)
            print(
                f"| {commit or 'here'} | {found['seconds']['capture']:.1f} | {found['layer']:.1f} | "
                f"{found['wall']:.0f} | {found['cpu']:.0f} | {found['peak'] / 1e9:.2f} | "
                f"{found['temporary'] / 1e9:.2f} |", flush=True,
            )  # fmt: skip
            print(found, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
