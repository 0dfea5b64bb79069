"""A pass of your own: input features that see large activations get a finer grid, at no cost when the model runs.

A 4-bit weight is off by up to half a step, and the error reaches the output times the activation. Multiplying a column
of the weight by s makes its relative error s times smaller; dividing the activation by s, in the norm or the linear in
front, keeps the function. With s = mean|x|^0.5 this is AWQ (arXiv 2306.00978) with a fixed exponent, no search.

The script exports a model with and without the pass and says how far each is from the float model:

    python samples/custom_pass.py MODEL [TEXT_FILE]
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

import qexport
from qexport.errors import PassError
from qexport.graph.sites import FoldSite, fold_sites
from qexport.passes.base import Context, GraphPass, PassResult, SiteRecord
from qexport.passes.equalization.equalize import fold


class MeanAbs:
    """Mean of |x| for each feature of a value, while calibration data runs through the block."""

    def __init__(self) -> None:
        self._sum, self._rows = torch.zeros(()), 0

    def update(self, x: torch.Tensor) -> None:
        """Take in x [tokens, features] float32."""
        self._sum, self._rows = self._sum + x.abs().sum(0), self._rows + len(x)

    def value(self) -> torch.Tensor:
        return self._sum / max(self._rows, 1)


@dataclass(frozen=True)
class ScaleByActivation(GraphPass):
    """Multiply weight columns by mean|x|^power and divide what produces x by it.

    Attributes:
        recipe: tells which linears stay in float; they have nothing to gain.
        power: 0 changes nothing, 1 makes all features equally large.
    """

    recipe: qexport.Recipe
    power: float = 0.5
    preserves_output: ClassVar[bool] = True  # so qexport checks on the calibration data that the block's outputs stay

    def requires(self, module: GraphModule) -> None:
        if not 0 <= self.power <= 1:
            raise PassError(f"power {self.power} is not between 0 and 1")

    def statistics(self, module: GraphModule) -> dict[Node, Callable]:
        return {site.value: MeanAbs for site in fold_sites(module.graph) if not self._why_not(site)}

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for site in fold_sites(module.graph):
            names = ", ".join(linear.name for linear in site.consumers)
            if why := self._why_not(site):
                result.skipped.append(SiteRecord(names, why))
                continue
            factors = self._factors(site, context.statistics[site.value].value())
            fold(module, site, factors)
            result.changed.append(
                SiteRecord(names, "scaled", {"largest/smallest": round((factors.max() / factors.min()).item(), 2)})
            )
        module.recompile()
        return result

    def _why_not(self, site: FoldSite) -> str:
        if all(self.recipe.scheme_for(linear.name) is None for linear in site.consumers):
            return "kept in float"
        return site.why  # empty where a factor can be folded

    def _factors(self, site: FoldSite, importance: torch.Tensor) -> torch.Tensor:
        if site.repeat is not None:  # query heads that read the same key/value head share its factor
            kv_heads, queries, head_dim = site.repeat
            importance = importance.view(kv_heads, queries, head_dim).mean(1).reshape(-1)
        factors = importance.clamp_min(1e-4 * importance.max().item() + 1e-12) ** self.power
        return factors / (factors.max() * factors.min()).sqrt()


def main(model: str, text: str | None) -> None:
    recipe = qexport.Recipe.load("w4a16_g32_rtn").with_calibration(samples=8, sequence_length=256, batch_size=8)
    for name, passes in (("plain", []), ("scaled", [ScaleByActivation(recipe)])):
        out = f"out/custom_pass_{name}"
        qexport.export(model, recipe, out_dir=out, calibration=text, extra_passes=passes, overwrite=True)
        report = qexport.validate(out, model, text=text, windows=4, window=256)
        scores = report.logits
        print(f"{name:<8} KL against the float model {scores.kl_mean:.4f}, top-1 agreement {scores.top1_agreement:.1%}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
