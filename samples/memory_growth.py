"""Peak memory and time of an export as a model gets deeper: memory must stay flat, time grow linearly.

Writes random Llamas of a 7B model's width to disk (bfloat16), or text encoders, exports each in a process of its own
and prints a table. Anonymous memory is what the system cannot give to others: pages of a checkpoint that is mapped are
not in it.

    python samples/memory_growth.py --depths 8 16 32 --recipe w4a16_g128_rtn
    python samples/memory_growth.py --depths 2 4 8 --recipe w8a8_dyn --samples 8 --sequence-length 128
    python samples/memory_growth.py --kind encoder --depths 12 24 --hidden 2048 --intermediate 8192 --recipe w8a8_dyn
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, LlamaConfig

CHILD = """
import json, resource, sys, threading, time
from qexport import export
from qexport.recipe.recipe import Recipe
import psutil
options = json.loads(sys.argv[1])
recipe = Recipe.load(options["recipe"])
calibration = recipe.calibration.model_copy(update=options["calibration"])
anonymous = [0]
def watch():
    while True:
        with open("/proc/self/status") as file:
            found = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        anonymous[0] = max(anonymous[0], found * 1024)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
base, start = psutil.Process().memory_info().rss, time.perf_counter()
result = export(options["model"], recipe.model_copy(update={"calibration": calibration}), out_dir=options["out"])
usage = resource.getrusage(resource.RUSAGE_SELF)
peak, cpu = usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
wall = time.perf_counter() - start
memory = {"base": base, "peak": peak, "anonymous": anonymous[0]}
print(json.dumps({**memory, "cpu": cpu, "wall": wall, "seconds": result.seconds}))
"""


def write_llama(folder: Path, depth: int, hidden: int, intermediate: int, vocab: int) -> int:
    """A random Llama on disk, one safetensors file for each layer; returns the number of its parameters."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=depth, num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128, vocab_size=vocab, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).to(torch.bfloat16)

    attention = {f"self_attn.{n}_proj.weight": matrix(hidden, hidden) for n in "qkvo"}
    mlp = {
        "mlp.gate_proj.weight": matrix(intermediate, hidden),
        "mlp.up_proj.weight": matrix(intermediate, hidden),
        "mlp.down_proj.weight": matrix(hidden, intermediate),
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    norms = {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()}
    files: dict[str, str] = {}
    parameters = 0
    parts = [(f"model.layers.{i}.", {**attention, **mlp, **norms}) for i in range(depth)]
    ends = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
        "model.norm.weight": ones.clone(),
    }
    for number, (prefix, tensors) in enumerate([*parts, ("", ends)]):
        name = f"model-{number:05d}.safetensors"
        save_file({prefix + n: t for n, t in tensors.items()}, folder / name)
        files.update({prefix + n: name for n in tensors})
        parameters += sum(t.numel() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return parameters


def write_encoder(folder: Path, depth: int, hidden: int, intermediate: int, vocab: int) -> int:
    """A random BERT on disk, the same."""
    config = BertConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=depth, num_attention_heads=hidden // 64,
        vocab_size=vocab,
    )  # fmt: skip
    config.architectures, config.dtype = ["BertModel"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModel.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        number = next((part for part in name.split(".") if part.isdigit()), "ends")
        made = torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)
        made = torch.ones(shape) if name.endswith("LayerNorm.weight") else made
        groups.setdefault(number, {})[name] = made.to(torch.bfloat16)
        if len(groups) > 1 and number in groups and name.endswith("output.LayerNorm.bias") and "attention" not in name:
            save_file(groups.pop(number), folder / f"model-{number}.safetensors")
        files[name] = f"model-{number}.safetensors"
    for number, tensors in groups.items():
        save_file(tensors, folder / f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sum(shape.numel() for shape in shapes.values())


KINDS = {"llama": write_llama, "encoder": write_encoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="llama")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--recipe", default="w4a16_g128_rtn")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--folder", help="where models and exports are written (needs 2 bytes a parameter, twice)")
    args = parser.parse_args()
    calibration = {"source": "random", "samples": args.samples, "sequence_length": args.sequence_length}
    print(
        f"recipe {args.recipe}, hidden {args.hidden}; calibration, where needed: "
        f"{args.samples} x {args.sequence_length} random tokens\n"
    )
    columns = ["layers", "parameters", "checkpoint GB", "peak RSS GB", "anonymous GB", "wall s", "CPU s", "CPU s / 1e9"]
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for depth in args.depths:
        root = Path(tempfile.mkdtemp(prefix="qexport-growth-", dir=args.folder))
        try:
            parameters = KINDS[args.kind](root / "model", depth, args.hidden, args.intermediate, args.vocab)
            size = sum(f.stat().st_size for f in (root / "model").iterdir())
            options = {
                "model": str(root / "model"),
                "out": str(root / "out"),
                "recipe": args.recipe,
                "calibration": calibration,
            }
            child = subprocess.run([sys.executable, "-c", CHILD, json.dumps(options)], capture_output=True, text=True)
            if child.returncode:
                sys.exit(child.stderr)
            report = json.loads(child.stdout.strip().splitlines()[-1])
            print(
                f"| {depth} | {parameters / 1e9:.2f}e9 | {size / 1e9:.1f} | {report['peak'] / 1e9:.2f} "
                f"| {report['anonymous'] / 1e9:.2f} "
                f"| {report['wall']:.0f} | {report['cpu']:.0f} | {report['cpu'] / parameters * 1e9:.1f} |",
                flush=True,
            )
            print(f"depth {depth}: {report}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
