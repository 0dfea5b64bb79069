"""Whether a low-rank branch, or another method for some linears, gives more KL for its bytes than bits do.

    python samples/ranks_or_bits.py MODEL --text FILE

By the Fisher metric of the float model (`calibrate.fisher`) an error E of a weight adds
1/2 mean over tokens of f_t sum over c of g_c (x_t E_c)^2 to the KL. Weights of every few blocks get 4 bits in groups of
32 by each method. What GPTQ leaves is then corrected by the best matrix of each rank there is for exactly this sum: the
SVD of its error, weighted from both sides. Codes and factors are found on the first half of the text's tokens, and
priced on the other. A branch of rank r has r (K + N) factors, of 16 bits here. Printed are sums over linears of a
kind: the KL foretold of each method, and for each rank the bits a weight that its factors take, the share of GPTQ's KL
that it leaves, and what as many bits in codes leave, on a straight line through 4 and 5 bits of log KL.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from qexport.api.stages.capturing import capture_model
from qexport.calibrate.block_activations import decoder_inputs
from qexport.calibrate.fisher import Importance, felt
from qexport.graph.edit import get_tensor
from qexport.quant.formats import IntegerFormat, Scheme
from qexport.quant.gptq import gptq_quantize
from qexport.quant.hessian import HessianStatistic
from qexport.quant.hqq import hqq_quantize
from qexport.validation.text import choose_text

FOUR, FIVE, RANKS, FACTOR_BITS = "w4a16_g32_s8", "w5a16_g32_s8", (4, 8, 16), 16
METHODS = ("whole ranges", "narrowed ranges", "HQQ", "GPTQ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--every", type=int, default=6, help="blocks of which one is looked at")
    given = parser.parse_args()

    captured = capture_model(given.model)
    chosen = choose_text(captured, given.text, given.windows, 512, lambda *_: None).windows
    feeds = [decoder_inputs(captured, ids[None], torch.ones_like(ids)[None]) for ids in chosen]
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    best: dict[str, int] = defaultdict(int)
    for place, found in enumerate(felt(captured, feeds)):
        if place % given.every:
            continue
        for linear, inputs, importance in found.linears:
            kind, weight = linear.name.rpartition(".")[2], get_tensor(found.block.module, linear.weight)
            costs = costs_of(weight, inputs, importance)
            for name, cost in costs.items():
                sums[kind][name] += cost
            sums[kind]["weights"] += weight.numel()
            sums[kind]["sides"] += sum(weight.shape)
            best[min(METHODS, key=costs.__getitem__)] += 1
    print_tables(sums, best)


def costs_of(weight: Tensor, inputs: Tensor, importance: Importance) -> dict[str, float]:
    """KL foretold on the second half of the rows, by method and by rank, of what was found on the first half."""
    half = len(inputs) // 2
    seen, other = inputs[:half], Importance(importance.rows[half:], importance.columns)
    hessian = HessianStatistic("token_norm", 0.75)
    hessian.update(seen)
    four, five = Scheme.parse(FOUR).weight, Scheme.parse(FIVE).weight
    assert isinstance(four, IntegerFormat) and isinstance(five, IntegerFormat)
    codes = {
        "whole ranges": four.round_to_nearest(weight),
        "narrowed ranges": four.round_to_nearest(weight, clip_search=True),
        "HQQ": hqq_quantize(weight, four),
        "GPTQ": gptq_quantize(weight, hessian.value(), four, clip_search=True),
        "5 bits": gptq_quantize(weight, hessian.value(), five, clip_search=True),
    }
    errors = {name: found.dequantize() - weight for name, found in codes.items()}
    for rank, correction in corrections(errors["GPTQ"], seen, importance.rows[:half], importance.columns).items():
        errors[f"rank {rank}"] = errors["GPTQ"] - correction
    return {name: other.kl(inputs[half:] @ error.t()) for name, error in errors.items()}


def corrections(error: Tensor, seen: Tensor, rows: Tensor, columns: Tensor) -> dict[int, Tensor]:
    """By rank the matrix [N, K] that takes the most from what an error costs, of double precision on the way."""
    x = seen.double() * rows.double().sqrt()[:, None]
    metric = x.t() @ x / len(x)
    values, vectors = torch.linalg.eigh(metric + 1e-2 * metric.diagonal().mean() * torch.eye(len(metric)))
    root, inverse = (vectors * values**power @ vectors.t() for power in (0.5, -0.5))
    left = columns.double().clamp_min(1e-12).sqrt()
    u, s, v = torch.linalg.svd(left[:, None] * error.double() @ root, full_matrices=False)
    return {r: ((u[:, :r] * s[:r] @ v[:r] @ inverse) / left[:, None]).float() for r in RANKS}


def print_tables(sums: dict[str, dict[str, float]], best: dict[str, int]) -> None:
    """Sums by kind of linear."""
    print("| linear | " + " | ".join(METHODS) + " |\n| --- |" + " --- |" * len(METHODS))
    for kind, found in sums.items():
        print(f"| {kind} | " + " | ".join(f"{found[name]:.5f}" for name in METHODS) + " |")
    print("\nThe least for " + ", ".join(f"{best[name]} linears: {name}" for name in METHODS) + "\n")
    print("| linear | " + " | ".join(f"rank {r}: bits a weight | left | in codes" for r in RANKS) + " |")
    print("| --- |" + " --- |" * (3 * len(RANKS)))
    for kind, found in sums.items():
        cells = []
        for rank in RANKS:
            bits = FACTOR_BITS * rank * found["sides"] / found["weights"]
            in_codes = (found["5 bits"] / found["GPTQ"]) ** bits
            cells += [f"{bits:.2f}", f"{found[f'rank {rank}'] / found['GPTQ']:.2f}", f"{in_codes:.2f}"]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
