"""How fast files of recurrent decoders, and of attention to chosen tokens, are beside transformers' float models here.

    python samples/recurrent_decoders.py [mamba ...] [--layers 4] [--prompt 256] [--turns 7]

Layers of the shapes of mamba-130m, mamba2-130m and rwkv-4-169m with random weights and a small vocabulary, so that the
recurrences weigh what they do there; and, by name, of a small model with the indexer of DeepSeek V3.2 (deepseek_v32)
and the windows and indexer of DeepSeek V4 (deepseek_v4), for prompts of more tokens than they choose. transformers runs
without its own kernels for GPUs, in PyTorch. Milliseconds are the medians of the turns on one thread, for a prompt and
for a token behind it; beside them how many times transformers' speed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import qexport  # isort: skip  before torch's threads are set
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, logging

from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.runtime.decoder import open_decoder

SHAPES = {
    "mamba": {"model_type": "mamba", "hidden_size": 768, "state_size": 16},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 768, "state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1,
    },
    "rwkv": {"model_type": "rwkv", "hidden_size": 768, "rescale_every": 0},
}  # fmt: skip
CHOOSING = {
    "deepseek_v32": {
        "model_type": "deepseek_v32", "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
        "num_key_value_heads": 8, "q_lora_rank": 512, "kv_lora_rank": 512, "first_k_dense_replace": 99,
        "index_topk": 512, "max_position_embeddings": 4096,
    },
    "deepseek_v4": {
        "model_type": "deepseek_v4", "hidden_size": 1024, "num_attention_heads": 8, "q_lora_rank": 512, "o_groups": 2,
        "o_lora_rank": 512, "moe_intermediate_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "num_hash_layers": 0, "index_topk": 128, "max_position_embeddings": 4096,
    },
}  # fmt: skip
SMALL = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SCHEMES = ("float32", "w4a16_g32", "w8a8_dyn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="shape", help=f"some of {', '.join(SHAPES | CHOOSING)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    print("| layers of | runs | prompt | faster | token | faster |\n| --- | --- | --- | --- | --- | --- |")
    for shape in given.shapes or SHAPES:
        with tempfile.TemporaryDirectory() as place:
            took = measured(shape, Path(place), given)
        first = next(iter(took.values()))
        for name, pair in took.items():
            cells = (f"{ms:.1f} | {base / ms:.2f}" for ms, base in zip(pair, first, strict=True))
            print(f"| {shape} | {name} | {' | '.join(cells)} |", flush=True)


def measured(shape: str, place: Path, given: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Milliseconds of a prompt and of a token, by what runs them."""
    torch.manual_seed(0)
    kind = dict((SHAPES | CHOOSING)[shape])
    config = AutoConfig.for_model(kind.pop("model_type"), **kind, **SMALL, num_hidden_layers=given.layers)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(place / "model")
    ids = torch.randint(3, 512, (1, given.prompt))
    runs: dict[str, Callable[[], tuple[float, float]]] = {"transformers": lambda: in_transformers(model, ids)}
    for scheme in SCHEMES:
        left = [Override(match="*", scheme="float")] if scheme == "float32" else []
        calibration = CalibrationSpec(source="random", samples=2, sequence_length=16)
        recipe = Recipe(
            scheme="w8a8_dyn" if left else scheme, overrides=left, weights={"method": "rtn"}, calibration=calibration
        )
        qexport.export(place / "model", recipe, out_dir=place / scheme)
        decoder = open_decoder(place / scheme, threads=1)
        runs[scheme] = lambda decoder=decoder: in_a_file(decoder, ids.numpy())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(1 + given.turns):
        for name, run in runs.items():
            times[name].append(run())
    return {name: tuple(map(statistics.median, zip(*found[1:], strict=True))) for name, found in times.items()}


def in_transformers(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of the prompt and of a token behind it."""
    with torch.no_grad():
        start = time.perf_counter()
        if model.config.model_type == "rwkv":
            state = model(ids, use_cache=True).state
            middle = time.perf_counter()
            model(ids[:, :1], state=state, use_cache=True)
        else:
            kept = {"past_key_values" if model.config.model_type in CHOOSING else "cache_params": DynamicCache(
                config=model.config
            )}  # fmt: skip
            model(ids, **kept, use_cache=True)
            middle = time.perf_counter()
            model(ids[:, :1], **kept, use_cache=True)
    return 1000 * (middle - start), 1000 * (time.perf_counter() - middle)


def in_a_file(decoder, ids: np.ndarray) -> tuple[float, float]:
    decoder.reset()
    start = time.perf_counter()
    decoder.run(ids)
    middle = time.perf_counter()
    decoder.run(ids[:, :1])
    return 1000 * (middle - start), 1000 * (time.perf_counter() - middle)


if __name__ == "__main__":
    main()
