"""What of an export runs slower than in float, for `inspect`, the manifest and `bench`."""

from collections.abc import Sequence

from ..plan.linear_plan import LinearPlan
from ..recipe.methods import Equalization
from ..recipe.recipe import Recipe
from ..targets.base import Target


def slower_than_float(recipe: Recipe, plan: Sequence[LinearPlan], target: Target) -> str:
    """Which linears, and why; empty where none is."""
    said = [target.slower_than_float(plan)]
    rounded = sum(p.activation is not None for p in plan)
    methods = [m for m in recipe.methods if isinstance(m, Equalization)] if rounded else []
    said += [
        f"{rounded} of {len(plan)} linears are slower than in float32 and serve numerics only: {why}, "
        "so that the product stays that of floats"
        for method in methods
        if (why := method.why_float_products())
    ]
    return "; ".join(sentence for sentence in said if sentence)
