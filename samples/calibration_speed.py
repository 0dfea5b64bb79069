"""CPU seconds and memory that calibration takes for a layer of a large model's shape, also beside another version.

A random Llama of few layers, each of the real shape, is exported in processes of its own, in turns:

    python samples/calibration_speed.py --shape 1b
    python samples/calibration_speed.py --shape 8b --layers 1 --against v0.1.0 --runs 3

`--against` names a commit of this clone, whose code runs from a temporary work tree. Medians over runs of the mean over
layers; CPU seconds are those of all threads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# hidden size, intermediate size, attention heads, key and value heads
SHAPES = {
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
recipe = recipe.with_calibration(source="random", samples=options["samples"], sequence_length=options["tokens"])
export(options["model"], recipe, out_dir=options["out"], progress=progress)
layers = [(b[1] - a[1], b[2] - a[2]) for a, b in zip(marks, marks[1:]) if ".layers." in a[0]]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cpu, wall = (sum(layer[i] for layer in layers) / len(layers) for i in (0, 1))
print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak}))
"""


def write_model(folder: Path, shape: str, layers: int) -> None:
    """A random Llama in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


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
    with tempfile.TemporaryDirectory(prefix="qexport-") as out:
        command = [sys.executable, "-c", CHILD, json.dumps({**options, "out": f"{out}/made"})]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", default="w4a16_g32")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="in a sample")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--against", help="a commit of this clone")
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    options = {key: getattr(given, key) for key in ("recipe", "samples", "tokens", "threads")}
    sides = [("here", None)] + ([(given.against, given.against)] if given.against else [])
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in sides}
    with tempfile.TemporaryDirectory(prefix="qexport-") as model:
        write_model(Path(model), given.shape, given.layers)
        for run in range(given.runs):
            for name, commit in sides:
                with tree_of(commit) as tree:
                    found[name].append(measured(tree, options | {"model": model}))
                print(f"run {run + 1} of {given.runs}, {name}: {found[name][-1]['cpu']:.1f} CPU s", file=sys.stderr)
    print(f"{given.recipe}, a layer of {given.shape}'s shape, {given.samples} x {given.tokens} tokens")
    print("| code | CPU s a layer | wall s | peak memory, GB |", "| --- | --- | --- | --- |", sep="\n")
    medians = {name: [statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "peak")]
               for name, runs in found.items()}  # fmt: skip
    for name, (cpu, wall, peak) in medians.items():
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {peak / 1e9:.2f} |")
    if given.against:
        print(f"CPU seconds, here over {given.against}: {medians['here'][0] / medians[given.against][0]:.2f}")


if __name__ == "__main__":
    main()
