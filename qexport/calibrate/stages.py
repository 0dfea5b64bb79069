"""From a recipe to the passes that a block goes through, in the order that the mathematics demands."""

from collections.abc import Mapping, Sequence

from ..passes.activations import QuantizeActivations
from ..passes.base import GraphPass
from ..passes.plan import LinearPlan
from ..passes.smooth import SmoothQuant
from ..passes.weights import GPTQ, RoundToNearest
from ..recipe import Recipe


def passes_for(recipe: Recipe, plan: Mapping[str, LinearPlan], extra: Sequence[GraphPass] = ()) -> list[GraphPass]:
    """Exact transformations first, then weights, then activations: ranges are those of what is deployed.

    Args:
        plan: by linear name.
        extra: the caller's own passes; they see the block in float, before everything else.
    """
    quantizes_inputs = any(p.scheme is not None and p.scheme.activation is not None for p in plan.values())
    passes: list[GraphPass] = [*extra]
    if recipe.smooth is not None and quantizes_inputs:
        passes.append(SmoothQuant(plan, recipe.smooth.alpha))
    weights = recipe.weights
    if weights.method == "gptq":
        passes.append(GPTQ(plan, weights.damp, weights.act_order, weights.token_norm_power, weights.clip_search))
    else:
        passes.append(RoundToNearest(plan, weights.clip_search))
    if quantizes_inputs:
        passes.append(QuantizeActivations(plan, recipe.activations.observer, recipe.activations.percentile))
    return passes
