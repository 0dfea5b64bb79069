"""What an export refuses before it works on weights: one list for the export and for the dry run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import ranks
from ..artifact.manifest import SEQ2SEQ, VISION_LANGUAGE
from ..calibrate.data import writes_no_source, writes_none
from ..capture.graph import CapturedModel
from ..errors import InputError, LoweringError, RecipeError
from ..graph.convolution_sites import convolutions
from ..graph.edit import get_tensor
from ..graph.sites import linears
from ..graph.views import Convolution, tensor_name
from ..lower.attention_plan import plan_attention
from ..lower.check import check_forms, check_translations
from ..lower.gqa import GroupedAttention, count_attentions
from ..models.heads import head_of, reads_text
from ..models.pooling import read_pooling
from ..models.source import ModelFolder
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import convolutions_for, plan_for
from ..quant.narrowing import narrowed
from ..recipe.recipe import Recipe
from ..targets.base import Target
from .options import Options

_KINDS = {
    "encoder": "an encoder", "module": "a module", SEQ2SEQ: "an encoder-decoder",
    VISION_LANGUAGE: "a model of pictures and text",
}  # fmt: skip


@dataclass(frozen=True)
class Decisions:
    """What an export makes of every layer.

    Attributes:
        plan: of every linear, in order; embeddings: of every table of tokens; convolutions: of every convolution.
    """

    plan: list[LinearPlan]
    embeddings: list[EmbeddingPlan]
    convolutions: list[ConvolutionPlan]


def check_ranks(prepared: Any) -> None:
    """Refuse what several processes cannot do together.

    Args:
        prepared: a `stages.preparing.Preparation`.

    Raises:
        InputError: as said.
    """
    if ranks.size() == 1:
        return
    recipe = prepared.recipe
    trains = recipe.tune is not None or recipe.weights.training_passes(recipe.calibration.samples, 1) > 0
    why = (
        "an encoder-decoder is exported" if prepared.in_two_parts
        else "a model of pictures and text is exported" if prepared.in_three_parts
        else f"{recipe.name} trains on all samples" if trains
        else "passes of your own see all samples" if prepared.options.extra_passes else ""
    )  # fmt: skip
    if why:
        raise InputError(f"{why} by one process only", place="torchrun", remedy="Export without torchrun")


def check_folder_writes(prepared: Any) -> None:
    """Refuse a model that would have to write its own calibration text and writes none, without capturing it.

    What overrides keep in float needs no data, and only the captured model says what they match: with overrides the
    same is refused after capture.

    Args:
        prepared: as above.

    Raises:
        InputError: as said.
        QExportError: an option that such a model does not have either, see `check_applicable`.
    """
    folder, recipe = prepared.source, prepared.recipe
    if prepared.data is not None or recipe.calibration.source != "self" or not isinstance(folder, ModelFolder):
        return
    if not recipe.always_calibrates or prepared.in_three_parts:  # the latter say it themselves
        return
    if prepared.in_two_parts:
        check_applicable(SEQ2SEQ, prepared.options, recipe)  # whatever text is passed, these stay wrong
        raise writes_no_source(reads_text(folder.config))
    if read_pooling(folder.path) is not None or head_of(folder.config, folder.name) is not None:
        check_applicable("encoder", prepared.options, recipe)
        raise writes_none("an encoder")


def decide(captured: CapturedModel, recipe: Recipe, target: Target, attention: str) -> Decisions:
    """Decide for every layer from shapes alone, and refuse what cannot become a file.

    Args:
        attention: as `export` takes it.

    Raises:
        RecipeError: the recipe asks for what this model or target does not have.
        LoweringError: an operator has no ONNX form, or the recipe's cache has none with this attention.
        InputError: the target has no kernel for a linear.
    """
    graphs = [block.module.graph for block in captured.blocks]
    if captured.kind == "decoder":
        check_translations(graphs)
    else:
        check_forms(graphs, target.operators)
    check_cache(captured, recipe, target, attention)
    plan, embeddings = plan_for(captured, recipe, target.dtype.itemsize, target.least_states)
    target.check(plan, recipe)
    return Decisions(plan, embeddings, convolutions_for(captured, recipe, target.no_convolution))


def check_applicable(kind: str, options: Options, recipe: Recipe) -> None:
    """Refuse what was asked for and means nothing for a kind of model.

    Args:
        kind: see `CapturedModel.kind`, or "encoder-decoder" or "vision-language".

    Raises:
        InputError, RecipeError: what, and for what kind it is.
    """
    parts = kind == SEQ2SEQ
    if parts and options.logits != "all":
        raise InputError(
            "an encoder-decoder always makes the logits of all tokens", place="logits",
            remedy="Export it with logits all"
        )
    if kind in ("decoder", VISION_LANGUAGE):  # whose last part is one
        return
    if options.max_length is not None:
        raise InputError(
            f"only decoders have a maximum length, and this is {_KINDS[kind]}", place="max_length",
            remedy="Leave it out",
        )  # fmt: skip
    if options.attention != "grouped":
        raise InputError(
            f"only decoders have a choice of attention, and this is {_KINDS[kind]}", place="attention",
            remedy="Leave it out",
        )  # fmt: skip
    alone = [method.key for method in recipe.methods if method.needs_grouped_attention]
    alone += ["prefill"] if recipe.prefill is not None else []
    if alone:
        raise RecipeError(
            f"{alone[0]} is only for decoders, and this is {_KINDS[kind]}", place=alone[0], remedy="Remove it"
        )


def check_measurable(kind: str, calibrate: bool) -> None:
    """Refuse a dry run that measures ranges of a model whose parts calibrate on what they hand to each other.

    Raises:
        InputError: it should calibrate.
    """
    if calibrate:
        raise InputError(
            f"the ranges of {_KINDS[kind]} are only measured when it is exported", place="calibrate",
            remedy="Inspect it without calibration",
        )  # fmt: skip


def check_range(captured: CapturedModel, decisions: Decisions, dtype: torch.dtype) -> None:
    """Refuse weights that stay float and that the target's dtype cannot hold; they are read one by one.

    Raises:
        NumericsError: names the first one.
    """
    if torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max:
        return  # the range of float32
    for name in _staying_float(captured, decisions):
        narrowed(captured.load(name), dtype, name)


def _staying_float(captured: CapturedModel, decisions: Decisions) -> Iterator[str]:
    by_name = {p.name: p for p in (*decisions.plan, *decisions.convolutions)}
    quantized = {e.weight for e in decisions.embeddings if e.scheme is not None}
    quantized |= {p.state.name for p in decisions.plan if p.state is not None}
    for block in captured.blocks:
        graph = block.module.graph
        quantized |= {found.weight for found in linears(graph) if by_name[found.name].scheme is not None}
        named = convolutions(graph).items()
        quantized |= {tensor_name(Convolution.of(n).weight) for name, n in named if by_name[name].scheme is not None}
    seen = quantized | captured.constants.keys()
    for block in captured.blocks:
        for name in block.parameters:
            if name not in seen and get_tensor(block.module, name).is_floating_point():
                seen.add(name)
                yield name


def check_cache(captured: CapturedModel, recipe: Recipe, target: Target, attention: str) -> None:
    """Refuse a recipe that rounds a cache that a decoder reads otherwise than grouped attention of the target does."""
    key = next((method.key for method in recipe.methods if method.needs_grouped_attention), None)
    if key is None or captured.kind != "decoder":
        return
    remedy = f"Leave {key} out of the recipe"
    caches = sum(port.name.startswith("past_key_values.") for port in captured.inputs) // 2
    if count_attentions(captured) < caches:
        raise RecipeError(
            "its attention is written out, and a cache of codes needs grouped attention", place=key,
            remedy=remedy,
        )  # fmt: skip
    grouping = plan_attention(captured, attention, captured.load)
    if not isinstance(grouping, GroupedAttention):
        raise LoweringError(
            f"a cache of codes needs grouped attention, but it is standard here: {grouping or 'as asked for'}",
            place=key, remedy=remedy,
        )  # fmt: skip
    if grouping.biases and not target.codes_beside_bias:
        raise LoweringError(
            f"{target.provider} has no kernel for a cache of codes where scores have a bias (ALiBi)", place=key,
            remedy=remedy,
        )  # fmt: skip
