"""From a recipe to the passes that a block goes through, in the order that the mathematics demands."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..passes.activations.quantize import QuantizeActivations
from ..passes.base import GraphPass
from ..passes.branches.lorc import LoRC
from ..passes.branches.outliers import SeparateOutliers
from ..passes.cache.kv_cache import QuantizeCache
from ..passes.convolutions import QuantizeConvolutions
from ..passes.embedding import QuantizeEmbedding, ShareEmbedding
from ..passes.equalization.awq import AWQ
from ..passes.equalization.crossquant import CrossQuant
from ..passes.equalization.fptq import FPTQ
from ..passes.equalization.lae import LogEqualize
from ..passes.equalization.smoothquant import SmoothQuant
from ..passes.moe_coverage import CountChoices
from ..passes.weights.gptq import GPTQ
from ..passes.weights.hqq import HalfQuadratic
from ..passes.weights.rtn import RoundToNearest
from ..passes.weights.zq_global import ZQGlobal
from ..passes.weights.zq_local import ZQLocal
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..quant.formats import ActivationFormat, IntegerFormat, QuantizedWeight, WeightFormat
from ..quant.gptq import gptq_quantize
from ..quant.hqq import hqq_quantize
from ..recipe.recipe import Recipe

_BY_DATA = ("gptq", "zq_local", "zq_global")  # methods whose weights follow from calibration data


def passes_for(
    recipe: Recipe,
    plan: Mapping[str, LinearPlan],
    extra: Sequence[GraphPass] = (),
    calibrated: bool = True,
    embeddings: Sequence[EmbeddingPlan] = (),
    hessian: torch.Tensor | None = None,
    convolutions: Sequence[ConvolutionPlan] = (),
) -> list[GraphPass]:
    """Exact transformations first, then weights, their branches, and activations: ranges are those of what is deployed.

    Args:
        plan: by linear name.
        extra: the caller's own passes; they see the block in float, before everything else but an output projection
            whose codes an embedding has decided already.
        calibrated: whether there is calibration data.
        embeddings: the decisions for the tables of token embeddings.
        hessian: of what the output projection reads that shares a table; None where GPTQ does not find its codes.
        convolutions: the decisions for convolutions.
    """
    quantizes_inputs = any(p.scheme is not None and p.scheme.activation is not None for p in plan.values())
    passes = [*_tables(recipe, embeddings, hessian), *extra, *_exact(recipe, plan, quantizes_inputs)]
    if recipe.llm_int8 is not None and quantizes_inputs:
        passes.append(SeparateOutliers(plan, recipe.llm_int8.threshold))
    static = any(p.scheme and p.scheme.activation and p.scheme.activation.kind == "static" for p in plan.values())
    if calibrated and (static or recipe.weights.method in _BY_DATA):
        passes.append(CountChoices(plan))
    passes += _weights(recipe, plan)
    if recipe.lorc is not None:
        lorc = recipe.lorc
        passes.append(LoRC(plan, lorc.rank, lorc.factors == "int8", lorc.shared, lorc.weighted))
    if recipe.kv_cache is not None:
        passes.append(QuantizeCache(recipe.kv_cache.bits, recipe.kv_cache.scales == "channel"))
    if quantizes_inputs:
        given = recipe.activations
        dynamic = recipe.crossquant is not None and recipe.crossquant.row_scale == "dynamic"
        alpha = recipe.crossquant.alpha if dynamic else None
        passes.append(QuantizeActivations(plan, given.observer, given.percentile, calibrated, given.only_kernel, alpha))
    if any(c.scheme is not None for c in convolutions):
        passes.append(QuantizeConvolutions({c.name: c for c in convolutions}))
    return passes


def _tables(recipe: Recipe, embeddings: Sequence[EmbeddingPlan], hessian: torch.Tensor | None) -> list[GraphPass]:
    """Embeddings as codes, and what reads these codes."""
    quantized, given = [e for e in embeddings if e.scheme is not None], recipe.weights
    if not quantized:
        return []

    def rounding(table: torch.Tensor, fmt: WeightFormat) -> QuantizedWeight:
        if not isinstance(fmt, IntegerFormat):
            return fmt.round_to_nearest(table)
        if given.method == "hqq":
            return hqq_quantize(table, fmt)
        if hessian is not None and hessian.any():
            found = {"damp": given.damp, "act_order": given.act_order, "clip_search": given.clip_search}
            return gptq_quantize(table, hessian, fmt, **found)
        return fmt.round_to_nearest(table, given.clip_search)

    shared = {e.linear: e for e in quantized if e.linear}
    first = QuantizeEmbedding({e.weight: e for e in quantized}, rounding)
    return [first, ShareEmbedding(shared)] if shared else [first]


def _exact(recipe: Recipe, plan: Mapping[str, LinearPlan], quantizes_inputs: bool) -> list[GraphPass]:
    """What moves factors between activations and weights."""
    smooth, cross = recipe.smooth, recipe.crossquant
    if smooth is not None and smooth.method == "awq":
        return [AWQ(plan, explicit=smooth.explicit, alpha=_number(smooth.alpha))]
    if recipe.prefill is not None:
        plan = {name: _as_prompt(linear) for name, linear in plan.items()}
    elif not quantizes_inputs:
        return []
    if smooth is not None and smooth.method == "lae":
        return [LogEqualize(plan, explicit=smooth.explicit)]
    if smooth is not None:
        return [SmoothQuant(plan, explicit=smooth.explicit, alpha=_number(smooth.alpha))]
    if cross is not None and cross.row_scale != "dynamic":
        paper, before = cross.row_scale == "paper", cross.round_weights == "before_fold"
        alpha = _number(cross.alpha)
        return [CrossQuant(plan, cross.explicit, alpha=alpha, paper_rows=paper, round_before_fold=before)]
    if recipe.fptq is not None:
        return [FPTQ(plan, static_up_to=recipe.fptq.static_up_to, dynamic_from=recipe.fptq.dynamic_from)]
    return []


def _as_prompt(linear: LinearPlan) -> LinearPlan:
    """The plan of a linear as prompts meet it: weight-only ones have their inputs rounded too."""
    scheme = linear.scheme
    if scheme is None or scheme.activation is not None or scheme.weight.group_size <= 0:
        return linear
    return replace(linear, scheme=replace(scheme, activation=ActivationFormat("dynamic")))


def _number(alpha: float | str) -> float | None:
    return None if alpha == "search" else alpha


def _weights(recipe: Recipe, plan: Mapping[str, LinearPlan]) -> list[GraphPass]:
    """What makes codes of weights; the trained methods change the float weight so that rounding it hurts less."""
    given = recipe.weights
    match given.method:
        case "gptq":
            return [GPTQ(plan, given.damp, given.act_order, given.token_norm_power, given.clip_search)]
        case "hqq":
            return [HalfQuadratic(plan)]
        case "zq_local":
            local = ZQLocal(plan, given.learning_rates, given.steps, given.token_norm_power)
            return [local, RoundToNearest(plan)]
        case "zq_global":
            return [ZQGlobal(plan, given.learning_rates, given.steps, given.token_norm_power), RoundToNearest(plan)]
    return [RoundToNearest(plan, given.clip_search)]
