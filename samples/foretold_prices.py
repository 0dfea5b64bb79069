"""What `--auto` foretells of single kinds of linears, and what they cost when nothing else is rounded.

    python samples/foretold_prices.py MODEL --calibration train.txt --text test.txt

Weights are rounded to nearest in whole ranges, in ranges that are narrowed where their own squared error falls (`rtn`
with `clip_search`), and in ranges that are narrowed where it falls weighed by inputs (`gptq` with it). Foretold are the
sums of the prices of all linears of a kind, on the calibration text; measured is the KL of the float model with just
these weights rounded, in PyTorch, on the other text.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from qexport.api.stages.capturing import capture_model
from qexport.calibrate.block_activations import Feeds
from qexport.calibrate.fisher import felt
from qexport.capture.graph import CapturedModel
from qexport.graph.sites import linears
from qexport.mixed_precision.costs import scheme_costs
from qexport.plan.model_plan import plan_for
from qexport.quant.formats import IntegerFormat, Scheme
from qexport.quant.metrics import kl_divergence
from qexport.recipe.recipe import Recipe
from qexport.recipe.registry import section
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.text import choose_text

WAYS = {
    "whole": None,
    "narrowed": section("weights", method="rtn", clip_search=True),
    "narrowed by inputs": section("weights", method="gptq", clip_search=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--scheme", default="w4a16_g32_s8")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    given = parser.parse_args()

    captured, scheme = capture_model(given.model), Scheme.parse(given.scheme)
    priced, measured = (
        decoder_feeds(captured, choose_text(captured, path, given.windows, given.window, lambda *_: None).windows)
        for path in (given.calibration, given.text)
    )
    plan, _ = plan_for(captured, Recipe(scheme=given.scheme, lm_head=given.scheme), 4)
    prices = {
        way: scheme_costs(captured, plan, [], [scheme], priced, method=method).kl for way, method in WAYS.items()
    }
    features = {
        linear.weight: importance.of_features(x)
        for found in felt(captured, priced) for linear, x, importance in found.linears
    }  # fmt: skip
    want = outputs(captured, measured)
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for block in captured.blocks:
        for linear in linears(block.module.graph):
            kinds[linear.name.rpartition(".")[2]].append((linear.name, linear.weight))
    print("| linears | " + " | ".join(f"{way}: foretold | measured" for way in WAYS) + " |")
    print("| --- |" + " --- |" * (2 * len(WAYS)))
    for kind, sites in kinds.items():
        cells = []
        for way in WAYS:
            changed = {weight: features[weight] for _, weight in sites}
            got = outputs(with_rounded(captured, scheme.weight, way, changed), measured)
            kl = sum(float(kl_divergence(w, g).mean()) for w, g in zip(want, got, strict=True)) / len(want)
            cells += [f"{sum(prices[way][name][scheme.name] for name, _ in sites):.4f}", f"{kl:.4f}"]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


def outputs(captured: CapturedModel, feeds: Sequence[Feeds]) -> list[Tensor]:
    """Logits of a model, a tensor [tokens, vocabulary] for each batch."""
    run = FloatOutputs(captured, feeds, ("logits",))
    found = [run.outputs(batch)["logits"][0] for batch in range(len(feeds))]
    run.close()
    return found


def with_rounded(captured: CapturedModel, fmt: IntegerFormat, way: str, features: dict[str, Tensor]) -> CapturedModel:
    """A model in which the weights that are named are rounded to nearest."""

    def load(name: str) -> Tensor:
        w = captured.weights.load(name)
        if name not in features:
            return w
        if way == "whole":
            return fmt.rounded(w)
        scales = fmt.clipped_scales(w, features[name] if way == "narrowed by inputs" else None)
        return fmt.decode(fmt.encode(w, *scales), *scales)

    moved = captured.copy()
    moved.weights = SimpleNamespace(load=load)
    return moved


if __name__ == "__main__":
    main()
