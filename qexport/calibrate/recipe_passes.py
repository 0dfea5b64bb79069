"""From a recipe to the passes that a block goes through, in the order that the mathematics demands."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..passes.activations.quantize import QuantizeActivations
from ..passes.base import GraphPass
from ..passes.convolutions import QuantizeConvolutions
from ..passes.embedding import QuantizeEmbedding, Rounding, ShareEmbedding
from ..passes.moe_coverage import CountChoices
from ..passes.recurrent import QuantizeStates
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..quant.formats import ActivationFormat, IntegerFormat, QuantizedWeight, WeightFormat
from ..recipe.methods import BlockMethod, Equalization, WeightMethod
from ..recipe.recipe import Recipe
from ..recipe.registry import Stage

Plans = Mapping[str, LinearPlan]


def passes_for(
    recipe: Recipe,
    plan: Plans,
    extra: Sequence[GraphPass] = (),
    calibrated: bool = True,
    embeddings: Sequence[EmbeddingPlan] = (),
    tables: Rounding | None = None,
    convolutions: Sequence[ConvolutionPlan] = (),
) -> list[GraphPass]:
    """Exact transformations first, then weights, their branches, and activations: ranges are those of what is deployed.

    Args:
        plan: by linear name.
        extra: the caller's own passes; they see the block in float, before everything else but an output projection
            whose codes an embedding has decided already.
        calibrated: whether there is calibration data.
        embeddings: the decisions for the tables of token embeddings.
        tables: how tables of embeddings are rounded; None as the recipe's way of finding weights does without data.
        convolutions: the decisions for convolutions.
    """
    methods = [method for method in recipe.methods if isinstance(method, BlockMethod)]
    passes = [*_tables(tables or TableRounding(recipe.weights), embeddings), *extra]
    for method in methods:
        if method.stage == Stage.ROUND and calibrated and (method.needs_calibration or _static(plan)):
            passes.append(CountChoices(plan))
        passes += _of(method, plan, recipe)
    if any(p.state for p in plan.values()):
        passes.append(QuantizeStates(plan))
    if _quantizes_inputs(plan):
        given = recipe.activations
        options = {k: v for m in methods if isinstance(m, Equalization) for k, v in m.quantizer_options().items()}
        quantize = QuantizeActivations(
            plan, given.observer, given.percentile, calibrated, given.only_kernel, token_clip=given.token_clip
        )
        passes.append(replace(quantize, **options))
    if any(c.scheme is not None for c in convolutions):
        passes.append(QuantizeConvolutions({c.name: c for c in convolutions}))
    return passes


def _of(method: BlockMethod, plan: Plans, recipe: Recipe) -> list[GraphPass]:
    """The passes of a method: none where it serves quantized activations and there are none."""
    if not method.for_activations:
        return method.passes(plan)
    if recipe.prefill is not None and method.stage == Stage.EQUALIZE:
        plan = {name: _as_prompt(linear) for name, linear in plan.items()}
    return method.passes(plan) if _quantizes_inputs(plan) else []


def _quantizes_inputs(plan: Plans) -> bool:
    return any(p.activation is not None for p in plan.values())


def _static(plan: Plans) -> bool:
    return any(p.activation is not None and p.activation.kind == "static" for p in plan.values())


def _tables(rounding: Rounding, embeddings: Sequence[EmbeddingPlan]) -> list[GraphPass]:
    """Embeddings as codes, and what reads these codes."""
    quantized = [e for e in embeddings if e.scheme is not None]
    if not quantized:
        return []

    shared = {e.linear: e for e in quantized if e.linear}
    first = QuantizeEmbedding({e.weight: e for e in quantized}, rounding)
    return [first, ShareEmbedding(shared)] if shared else [first]


class TableRounding:
    """The codes of tables of embeddings as a recipe's way of finding weights makes them.

    Args:
        seen: what the output projection that shares a table reads, as the weight method's `table_statistic` saw it;
            None where it saw nothing.
    """

    def __init__(self, weights: WeightMethod, seen: Any = None):
        self._weights, self._seen = weights, seen
        self._tried: tuple[str, WeightFormat, QuantizedWeight] | None = None

    def __call__(self, name: str, table: torch.Tensor, fmt: WeightFormat) -> QuantizedWeight:
        """The codes of a table [V, K]; those that were tried are handed out once and then forgotten."""
        tried, self._tried = self._tried, None
        if tried is not None and tried[:2] == (name, fmt):
            return tried[2]
        if not self._weights.rounds_tables or not isinstance(fmt, IntegerFormat):
            return fmt.round_to_nearest(table)
        return fmt.kept(self._weights.round_table(table, fmt, self._seen))

    def attempt(self, name: str, table: torch.Tensor, fmt: WeightFormat) -> QuantizedWeight:
        """The codes, which are kept for whoever asks next: nothing but the table decides them."""
        found = self(name, table, fmt)
        self._tried = name, fmt, found
        return found


def _as_prompt(linear: LinearPlan) -> LinearPlan:
    """The plan of a linear as prompts meet it: weight-only ones have their inputs rounded too."""
    scheme = linear.scheme
    if scheme is None or scheme.activation is not None or scheme.weight.group_size <= 0:
        return linear
    return replace(linear, scheme=replace(scheme, activation=ActivationFormat("dynamic")))
