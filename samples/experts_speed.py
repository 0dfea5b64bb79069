"""How fast a mixture of quantized experts is where only the chosen experts are computed, beside all of them.

    python samples/experts_speed.py [--scheme w4a16_g32] [--layers 2] [--experts 32] [--chosen 4] [--threads 1]

The model is random, of the kind of Qwen3-MoE. The first file has one QMoE node for the experts of a layer. In the
second one expert's weight has another scheme, which keeps the mixture dense: every expert is computed for every token,
as products of few-bit weights. Both are measured in turns by `qexport.bench`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qexport

PROMPTS, PAST = (16, 128, 512), 128


def save_model(folder: Path, given: argparse.Namespace) -> Path:
    """A random model, without a tokenizer."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=1024, hidden_size=given.hidden, moe_intermediate_size=given.inner,
        intermediate_size=given.inner, num_hidden_layers=given.layers, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, num_experts=given.experts, num_experts_per_tok=given.chosen, norm_topk_prob=True,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a16_g32")
    for name, default in (("layers", 2), ("hidden", 1024), ("inner", 512), ("experts", 32), ("chosen", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    rtn = {"method": "rtn"}
    odd = [{"match": "*.experts.0.down_proj", "scheme": f"{given.scheme}_asym"}]
    with tempfile.TemporaryDirectory(prefix="qexport-") as work:
        model, files = save_model(Path(work) / "model", given), {}
        for name, overrides in (("QMoE", []), ("dense", odd)):
            recipe = qexport.Recipe(scheme=given.scheme, weights=rtn, overrides=overrides)
            files[name] = qexport.export(model, recipe, out_dir=Path(work) / name).folder
        found = qexport.bench(
            files["QMoE"], files["dense"], prompt_lengths=PROMPTS, decode_pasts=(PAST,), repeats=given.repeats,
            threads=given.threads,
        )  # fmt: skip
    print(
        f"{given.scheme}, {given.layers} layers of {given.experts} experts of {given.inner}, {given.chosen} chosen, "
        f"hidden {given.hidden}; {given.threads} thread{'s' if given.threads > 1 else ''}\n"
    )
    print("| | QMoE | dense | ratio | of |\n| --- | --- | --- | --- | --- |")
    first, second, ratios = found.first, found.second, found.ratios
    rows = [(f"tokens/s after {PAST}", first.decode[PAST], second.decode[PAST], ratios[f"decode:{PAST}"])]
    rows += [(f"prompt of {n}, tokens/s", first.prefill[n], second.prefill[n], ratios[f"prefill:{n}"]) for n in PROMPTS]
    for name, mine, other, ratio in rows:
        print(f"| {name} | {mine:.0f} | {other:.0f} | {ratio:.2f} | {given.experts / given.chosen:.0f} |")
    for name, attribute, unit in (("load, s", "load_seconds", 1), ("memory, MB", "memory_bytes", 1e6)):
        mine, other = (getattr(measured, attribute) / unit for measured in (first, second))
        print(f"| {name} | {mine:.2f} | {other:.2f} | {mine / other:.2f} | |")
    print(f"| file, MB | {first.model_bytes / 1e6:.1f} | {second.model_bytes / 1e6:.1f} | | |")


if __name__ == "__main__":
    main()
