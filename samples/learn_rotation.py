"""Whether a learned rotation of the residual stream is better than a Hadamard matrix, by the KL that 4 bits cost.

    python samples/learn_rotation.py MODEL --calibration FILE --text OTHER -o rotation.safetensors [--steps 200]

What linears behind norms read is rounded per token, with a step in proportion to the largest magnitude; by the Fisher
metric of the float model (`calibrate.fisher`) that costs KL in proportion to the squared steps. The rotation goes down
that cost from a Hadamard matrix by Cayley SGD (SpinQuant, arXiv 2405.16406), the maximum made smooth as a norm of order
16. Printed is the cost before and after, on the calibration text and on another one. The matrix is for the recipe key
`rotation: {matrix: FILE}`.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import Node

from qexport.api.stages.capturing import capture_model
from qexport.calibrate.block_activations import decoder_inputs
from qexport.calibrate.fisher import felt
from qexport.graph.edit import get_tensor, is_call
from qexport.graph.views import Norm
from qexport.passes.model.rotation import RotateResidual
from qexport.quant.hadamard import rotation
from qexport.quant.stiefel import descend
from qexport.validation.text import choose_text

QMAX, ORDER, BATCH = 7, 16, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="another text, to measure on")
    parser.add_argument("--out", "-o", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=10, help="of 128 tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.01, help="mean angle of the first step")
    given = parser.parse_args()

    seen = rows_behind_norms(given.model, given.calibration, given.windows)
    other = rows_behind_norms(given.model, given.text, given.windows)
    width = seen[0].shape[1]
    start = rotation(width)
    picks = torch.Generator().manual_seed(0)

    def loss(turn: Tensor, step: int) -> Tensor:
        rows = torch.randint(len(seen[0]), (BATCH,), generator=picks)
        turned = seen[0][rows].double() @ turn
        return (seen[1][rows] * turned.abs().pow(ORDER).sum(1).pow(2 / ORDER)).mean()

    print("| rotation | foretold KL, calibration text | other text |\n| --- | --- | --- |", flush=True)
    show("none", torch.eye(width, dtype=torch.float64), seen, other)
    show("Hadamard", start, seen, other)
    show("orthogonal, at random", random_turn(width), seen, other)
    learned = descend(start, loss, given.steps, given.rate)
    show(f"learned, {given.steps} steps", learned, seen, other)
    save_file({"rotation": learned}, given.out)


def rows_behind_norms(model: str, text: Path, windows: int) -> tuple[Tensor, Tensor]:
    """What linears behind norms read before rotation, without the gains of norms, float32 [n, d], and what the squared
    largest magnitude of each costs in KL [n] when it is rounded."""
    captured = capture_model(model)
    RotateResidual().call(captured)
    chosen = choose_text(captured, text, windows, 128, lambda *_: None).windows
    feeds = [decoder_inputs(captured, ids[None], torch.ones_like(ids)[None]) for ids in chosen]
    rows, costs = [], []
    for block in felt(captured, feeds):
        found: dict[Node, tuple[Tensor, Tensor]] = {}
        for linear, inputs, importance in block.linears:
            if is_call(linear.input, *Norm.targets):
                weight = get_tensor(block.block.module, linear.weight)
                cost = importance.rows * (weight.square().sum(1) @ importance.columns)
                before = found.get(linear.input)
                found[linear.input] = (inputs, cost if before is None else before[1] + cost)
        for inputs, cost in found.values():
            rows.append(inputs)
            costs.append(cost)
    joined = torch.cat(rows)
    unturned = joined @ rotation(joined.shape[1]).t().float()
    return unturned, torch.cat(costs).double() * len(rows) / (2 * 12 * QMAX**2)


def random_turn(width: int) -> Tensor:
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def show(name: str, turn: Tensor, *texts: tuple[Tensor, Tensor]) -> None:
    """A row with the foretold KL on each text."""
    cells = [(cost * (rows @ turn.float()).abs().amax(1).double().square()).mean() for rows, cost in texts]
    print(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
