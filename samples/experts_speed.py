"""How fast a mixture of quantized experts is where only the chosen experts are computed, beside all of them.

    python samples/experts_speed.py [--scheme w4a16_g32] [--layers 2] [--experts 32] [--chosen 4]

The model is random, of the kind of Qwen3-MoE. The first file has one QMoE node for the experts of a layer. In the
second one expert's weight has another scheme, which keeps the mixture dense: every expert is computed for every token,
as products of few-bit weights. Both run in one process in turns, with one thread; times are CPU times, medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qexport
from qexport.artifact import manifest as manifests
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import open_session

PROMPTS, PAST, STEPS = (16, 128, 512), 128, 12


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


def open_decoder(folder: Path) -> Decoder:
    """The file on one thread."""
    manifest = manifests.load(folder)
    session = open_session(folder, manifest, threads=1)
    return Decoder(session, manifest.settings, max_length=max(*PROMPTS, PAST + STEPS))


def milliseconds(decoder: Decoder, ids: np.ndarray) -> float:
    """CPU time of one call; ids: [1, tokens]."""
    started = time.process_time()
    decoder.run(ids)
    return 1e3 * (time.process_time() - started)


def measured(decoders: dict[str, Decoder], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step and of prompts, by file; the first turn is not counted."""
    tokens = np.random.default_rng(0).integers(3, 1024, (1, max(*PROMPTS, PAST + STEPS)))
    found = {name: {} for name in decoders}
    for turn in range(repeats + 1):
        for name, decoder in list(decoders.items())[:: 1 if turn % 2 else -1]:
            taken = {}
            for length in PROMPTS:
                decoder.reset()
                taken[f"prompt of {length}"] = [milliseconds(decoder, tokens[:, :length])]
            decoder.reset()
            decoder.run(tokens[:, :PAST])
            taken[f"a token after {PAST}"] = [
                milliseconds(decoder, tokens[:, PAST + step : PAST + step + 1]) for step in range(STEPS)
            ]
            for what, times in taken.items() if turn else ():
                found[name].setdefault(what, []).extend(times)
    return {name: {what: statistics.median(times) for what, times in of.items()} for name, of in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a16_g32")
    for name, default in (("layers", 2), ("hidden", 1024), ("inner", 512), ("experts", 32), ("chosen", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    rtn = {"method": "rtn"}
    odd = [{"match": "*.experts.0.down_proj", "scheme": f"{given.scheme}_asym"}]
    with tempfile.TemporaryDirectory(prefix="qexport-") as work:
        model, files = save_model(Path(work) / "model", given), {}
        for name, overrides in (("QMoE", []), ("dense", odd)):
            recipe = qexport.Recipe(scheme=given.scheme, weights=rtn, overrides=overrides)
            files[name] = qexport.export(model, recipe, out_dir=Path(work) / name)
        times = measured({name: open_decoder(file.folder) for name, file in files.items()}, given.repeats)
    print(
        f"{given.scheme}, {given.layers} layers of {given.experts} experts of {given.inner}, {given.chosen} chosen, "
        f"hidden {given.hidden}\n"
    )
    print(f"| ms | QMoE | dense | dense / QMoE (of {given.experts / given.chosen:.0f}) |\n| --- | --- | --- | --- |")
    for what, mine in times["QMoE"].items():
        other = times["dense"][what]
        print(f"| {what} | {mine:.2f} | {other:.2f} | {other / mine:.2f} |")
    sizes = [files[name].manifest.bytes["model"] / 1e6 for name in ("QMoE", "dense")]
    print(f"| file, MB | {sizes[0]:.1f} | {sizes[1]:.1f} | |")


if __name__ == "__main__":
    main()
