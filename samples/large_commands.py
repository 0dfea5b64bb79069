"""Time and memory of each command on a model of Llama-3.2-1B's shape, with random weights, as a Markdown table.

    python samples/large_commands.py TOKENIZER --text text.txt --layers 4 [--folder DIR] [--recipe w4a16_g128_rtn]

TOKENIZER is a folder with the tokenizer of any model of fewer tokens. Each command runs in a process of its own; memory
is the largest resident set and how much of it is anonymous, which leaves out pages of files that are mapped.
Calibration and validation read the text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SIZES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
               vocab_size=128_256, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
               vocab_size=128_256, tie_word_embeddings=False),
}  # fmt: skip
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--shape", choices=SIZES, default="1B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recipe", default="w4a16_g128_rtn")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--max-bytes", default="100%", help="of --auto; 100%%: what the recipe took")
    parser.add_argument("--commands", nargs="+", help="only these rows, by their first words; export always runs")
    parser.add_argument("--folder", help="where model and exports are written")
    given = parser.parse_args()

    place = Path(tempfile.mkdtemp(prefix="qexport-large-", dir=given.folder))
    try:
        model, out = place / "model", place / "out"
        parameters = write_model(model, given.shape, given.layers, given.tokenizer)
        print(f"{given.shape}, {given.layers} layers, {parameters / 1e9:.2f}e9 parameters, {given.recipe}\n")
        print_row(["command", "wall s", "CPU s", "peak RSS, GB", "anonymous, GB"])
        print_row(["---"] * 5)
        measured = ["--text", str(given.text)]
        text = [*measured, "--windows", str(given.windows)]
        run("export", ["export", model, "-o", out, "--recipe", given.recipe, "--calibration", given.text])
        size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        most = str(size) if given.max_bytes == "100%" else given.max_bytes
        auto = ["export", model, "-o", place / "auto", "--auto", "--max-bytes", most, "--calibration", given.text]
        rows = {
            "validate": ["validate", out, "--reference", model, *text],
            "validate --sensitivity": ["validate", out, "--reference", model, *text, "--sensitivity"],
            "bench": ["bench", out, "--threads", "1", "--prompt-length", "128", "--past", "128", "--repeats", "1"],
            "report": ["report", out],
            "export --auto": [*auto, *measured, "--recipe", given.recipe],
        }
        for name, command in rows.items():
            if not given.commands or any(name == wanted for wanted in given.commands):
                run(name, command)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_model(folder: Path, shape: str, layers: int, tokenizer: Path) -> int:
    """A random Llama in bfloat16, a file for each layer; returns the number of its parameters."""
    config = LlamaConfig(**SIZES[shape], num_hidden_layers=layers, max_position_embeddings=8192, rope_theta=500_000.0)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copy(tokenizer / name, folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    width, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (width, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, width), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    ends = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        ends["lm_head.weight"] = (config.vocab_size, hidden)
    parts = [{f"model.layers.{i}.{name}.weight": size for name, size in shapes.items()} for i in range(layers)]
    files: dict[str, str] = {}
    generator, count = torch.Generator().manual_seed(0), 0
    for number, part in enumerate([*parts, ends]):
        tensors = {}
        for name, size in part.items():
            made = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * size[1] ** -0.5
            tensors[name] = made.to(torch.bfloat16)
            files[name] = f"model-{number:05d}.safetensors"
            count += made.numel()
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return count


def run(name: str, command: list) -> None:
    """Run a command of qexport and print what it took."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "qexport", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = anonymous = 0
    while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
        status = Path(f"/proc/{child.pid}/status").read_text()
        numbers = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith("kB")}
        peak, anonymous = max(peak, numbers.get("VmHWM", 0)), max(anonymous, numbers.get("RssAnon", 0))
        time.sleep(0.05)
    _, failed, usage = ended
    if failed:
        sys.exit(child.stderr.read().decode()[-2000:] if child.stderr else f"{name} failed")
    wall, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    print_row([name, f"{wall:.0f}", f"{cpu:.0f}", f"{peak * 1024 / 1e9:.2f}", f"{anonymous * 1024 / 1e9:.2f}"])


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
