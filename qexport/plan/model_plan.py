"""What a recipe means for a captured model, told from shapes alone."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from ..capture.graph import CapturedModel
from ..errors import RecipeError
from ..graph.convolution_sites import convolutions
from ..graph.edit import get_tensor, is_call
from ..graph.sites import Linear, linears, module_of_call, projection_behind
from ..graph.views import Convolution, Embedding, operand, tensor_name
from ..quant.formats import Scheme
from ..recipe.methods import BlockMethod
from ..recipe.recipe import Recipe
from ..recipe.sections import AUTO, FLOAT, TIED
from .convolution_plan import ConvolutionPlan, plan_convolutions
from .embedding_plan import EmbeddingPlan, plan_embeddings, token_embeddings
from .linear_plan import LinearPlan, make_plan, weight_bytes
from .recurrent_plan import float_steps

aten = torch.ops.aten
_LOGITS = ("logits", "start_logits", "end_logits")
_PARTS = (
    operator.getitem, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.index.Tensor,
)  # fmt: skip


def plan_for(
    captured: CapturedModel, recipe: Recipe, float_itemsize: int = 4, least_states: int | None = None
) -> tuple[list[LinearPlan], list[EmbeddingPlan]]:
    """The decision for every linear and every table of token embeddings of a captured model.

    Args:
        float_itemsize: bytes of a number that stays float.
        least_states: of recurrent layers that are not to stay float, see `recurrent_plan.float_steps`.

    Raises:
        RecipeError: an override matches no linear, or there is no embedding to quantize.
    """
    auto, recipe = recipe.embedding == AUTO, with_table(captured, recipe)
    heads = output_projections(captured)
    plan = make_plan(
        [(b.name, b.module.graph) for b in captured.blocks], lambda name: recipe.scheme_for(name, name in heads),
        captured.given if recipe.weights.keeps_codes else {}, partial(_sharing, recipe, _tables(captured)),
        recipe.whole_groups,
        float_steps(least_states),
    )  # fmt: skip
    names = [name for b in captured.blocks for name in convolutions(b.module.graph)]
    idle = recipe.unmatched_overrides([*(module_of_call(p.name) for p in plan), *names])
    if idle:
        raise RecipeError(
            f"matches no linear or convolution of the model: {idle[0]!r}",
            place="overrides",
            remedy="See `qexport inspect`",
        )
    tied = recipe.embedding == TIED
    wanted = None if tied or recipe.embedding == FLOAT else Scheme.parse(recipe.embedding)
    graphs = [(b.name, b.module.graph, captured.input_node("input_ids", b)) for b in captured.blocks]
    plan = [replace(p, bytes=weight_bytes(p, float_itemsize)) for p in plan]
    projection = output_projection(captured)
    without = "" if recipe.weights.rounds_tables else recipe.weights.method
    embeddings, plan = plan_embeddings(graphs, wanted, tied, plan, projection, without, float_itemsize)
    if not embeddings and recipe.embedding != FLOAT:
        raise RecipeError(
            "the model looks up no rows by input_ids, so there is no embedding to quantize", place="embedding",
            remedy="Leave out embedding",
        )  # fmt: skip
    if auto:
        embeddings = [replace(e, reason=e.reason or UNDECIDED) if e.scheme is not None else e for e in embeddings]
    return plan, embeddings


def _sharing(recipe: Recipe, tables: set[str], weight: str, several_blocks: bool) -> tuple[bool, str]:
    """Whether linears that have one weight can have one set of codes; see `make_plan`.

    Statistics over all uses are known before a block is quantized only where they all lie in it: blocks are quantized
    one after another, each on what the quantized ones before it hand on.
    """
    if weight in tables:
        return False, "and is a table of embeddings too"
    why_not = next((m.method for m in recipe.methods if isinstance(m, BlockMethod) and not m.takes_shared), None)
    if why_not is not None:
        return False, f"and {why_not} finds what suits one of them"
    blind = several_blocks and recipe.weights.calibrates
    return True, f"rounded to nearest without {recipe.weights.method}: several blocks read its weight" if blind else ""


UNDECIDED = "8 bits where 4 cost too much, which an export measures"
_FOUR, _EIGHT = "w4a16_g64_asym_s8", "w8a16_g32"


def with_table(captured: CapturedModel, recipe: Recipe, *, eight: bool = False) -> Recipe:
    """The recipe with `embedding: auto` in place: one table with the output projection where the model has one.

    An output projection that stays in float and is that table leaves it in float.

    Args:
        eight: in 8 bits, instead of the 4 of the output projection.
    """
    if recipe.embedding != AUTO:
        return recipe
    tables = _tables(captured)
    projection = output_projection(captured)
    shared = projection is not None and projection.weight in tables
    codes = recipe.lm_head != FLOAT and Scheme.parse(recipe.lm_head).table
    name = _EIGHT if eight else recipe.lm_head if codes else _FOUR
    if not tables or (shared and not codes):
        return recipe.model_copy(update={"embedding": FLOAT})
    return recipe.model_copy(update={"lm_head": name, "embedding": TIED} if shared else {"embedding": name})


def _tables(captured: CapturedModel) -> set[str]:
    """Names of the tensors in which rows are looked up by token ids."""
    graphs = [(block.module.graph, captured.input_node("input_ids", block)) for block in captured.blocks]
    return {tensor_name(Embedding.of(node).table) for graph, ids in graphs for node in token_embeddings(graph, ids)}


def convolutions_for(
    captured: CapturedModel, recipe: Recipe, none_for: Callable[[Sequence[int], int], str]
) -> list[ConvolutionPlan]:
    """The decision for every convolution.

    Args:
        none_for: as `plan_convolutions`.
    """
    graphs = [(b.name, b.module.graph) for b in captured.blocks]
    return plan_convolutions(graphs, recipe.scheme_for, none_for)


def output_projection(captured: CapturedModel) -> Linear | None:
    """The linear that makes the logits; None where there is none."""
    found = captured.output_node("logits")
    return None if found is None else projection_behind(found[1])


def output_projections(captured: CapturedModel) -> set[str]:
    """Names of the linears that make logits, of tokens, of texts or of the ends of an answer."""
    made = [captured.output_node(name) for name in _LOGITS]
    found = [projection_behind(_whole(node)) for _, node in filter(None, made)]
    return {linear.name for linear in found if linear is not None}


def _whole(value: Node) -> Node:
    """What `value` is a part of."""
    while is_call(value, *_PARTS):
        value = operand(value)
    return value


def described_embedding(plan: EmbeddingPlan) -> dict[str, Any]:
    """The decision for a table of token embeddings in plain types."""
    return {
        "name": plan.name, "scheme": plan.scheme.name if plan.scheme else FLOAT, "shape": list(plan.shape),
        "bytes": plan.bytes, "shared with": plan.linear or None, "reason": plan.reason,
    }  # fmt: skip


def bytes_by_part(
    captured: CapturedModel,
    plan: Sequence[LinearPlan],
    embeddings: Sequence[EmbeddingPlan],
    float_itemsize: int,
    planned: Sequence[ConvolutionPlan] = (),
) -> dict[str, int]:
    """Bytes of the export, every one in one part: quantized, embedding, lm_head, rest, and their total.

    Args:
        float_itemsize: bytes of a number that stays float.
        planned: the decisions for convolutions, which are among the rest.
    """
    sizes = weight_sizes(captured)
    by_name, projection = {p.name: p for p in plan}, output_projection(captured)
    quantized = [p for p in plan if p.scheme is not None and (projection is None or p.name != projection.name)]
    taken = {n.weight for b in captured.blocks for n in linears(b.module.graph) if by_name[n.name].scheme is not None}
    taken |= {p.state.name for p in quantized if p.state} | {e.weight for e in embeddings}
    small = {p.name: p.bytes for p in planned if p.scheme is not None}
    nodes = [(name, node) for b in captured.blocks for name, node in convolutions(b.module.graph).items()]
    taken |= {tensor_name(Convolution.of(node).weight) for name, node in nodes if name in small}
    head = 0
    if projection is not None:
        decided = by_name[projection.name]
        one_table = any(e.weight == projection.weight and e.scheme is None for e in embeddings)
        head = 0 if decided.scheme is None and one_table else decided.bytes
        taken.add(projection.weight)
    parts = {
        "quantized": sum(p.bytes for p in quantized),
        "embedding": sum(e.bytes for e in embeddings),
        "lm_head": head,
        "rest": float_itemsize * sum(count for name, count in sizes.items() if name not in taken) + sum(small.values()),
    }
    return {**parts, "total": sum(parts.values())}


def weight_sizes(captured: CapturedModel) -> dict[str, int]:
    """Number of elements of every weight of the checkpoint."""
    names = ((b, n) for b in captured.blocks for n in b.parameters if n not in captured.constants)
    return {n: get_tensor(b.module, n).numel() for b, n in names}
