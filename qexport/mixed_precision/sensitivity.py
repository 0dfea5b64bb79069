"""Which linears cost the most KL, and which schemes would buy back the most of it for a byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact.manifest import RECIPE_FILE, Manifest
from ..calibrate.fisher import Carried
from ..capture.graph import CapturedModel
from ..errors import InputError, RecipeError
from ..plan.model_plan import plan_for
from ..progress import StageProgress
from ..quant.formats import offered
from ..recipe.recipe import Recipe
from ..targets.base import target_named
from ..validation.reference import Feeds, rows_of
from ..validation.report import Sensitivity, SuggestedOverride, ValueComparison
from ..validation.restoring import Judged, kl_costs
from .costs import Costs, PricedItem, scheme_costs

_MOST_RESTORED = 12  # linears that are restored to float, each a run of the deployed model
_MOST_SUGGESTED = 10


@dataclass(frozen=True)
class InChain:
    """A part of a model of several, whose errors cost what they do to the logits of the last part.

    Attributes:
        carried: gradients that pass from part to part, the last part first.
        feeds: what the part reads where those in front of it are deployed, one dict for each batch.
        judged: see `Judged`.
    """

    carried: Carried
    feeds: Sequence[Feeds]
    judged: Judged


def costs_of(
    folder: Path, manifest: Manifest, captured: CapturedModel, feeds: Sequence[Feeds], progress: StageProgress,
    chain: InChain | None = None,
) -> Costs:  # fmt: skip
    """What schemes cost in the linears that an export quantizes, see `scheme_costs`.

    Args:
        feeds: what the float model reads.
        chain: of a part of a model; None for a decoder in one file.

    Raises:
        InputError: the folder has no readable recipe of its model, or the model makes no logits.
    """
    if captured.kind != "decoder" and chain is None:
        raise InputError("sensitivity is measured on logits, and this model has none", place="sensitivity")
    try:
        recipe = Recipe.load(folder / RECIPE_FILE)
        float_itemsize = getattr(torch, manifest.dtype).itemsize
        plan, embeddings = plan_for(captured, recipe, float_itemsize)
    except RecipeError as error:
        raise InputError(f"sensitivity needs the recipe of the export: {error}", place=str(folder)) from error
    schemes = offered(target_named(manifest.target).candidates)
    carried = chain.carried if chain else None
    return scheme_costs(captured, plan, embeddings, schemes, feeds, float_itemsize, progress, carried)


def restore(
    folder: Path, manifest: Manifest, captured: CapturedModel, feeds: Sequence[Feeds], rows: Sequence[ValueComparison],
    costs: Costs, *, transformed: bool, threads: int | None, provider: str | None, progress: StageProgress,
    chain: InChain | None = None,
) -> Sensitivity:  # fmt: skip
    """Restore the costliest linears to float, one at a time, and say what would buy back the most KL.

    Args:
        rows: of the quantized linears, with `kl_cost`.
        chain: as `costs_of` takes it.
    """
    priced = sorted(((row.kl_cost, row.name) for row in rows if row.kl_cost is not None), key=lambda pair: -pair[0])
    whole, falls = kl_costs(
        folder, manifest, captured, chain.feeds if chain else feeds,
        names={name for _, name in priced[:_MOST_RESTORED]}, transformed=transformed, threads=threads,
        provider=provider, progress=progress, judged=chain.judged if chain else None,
    )  # fmt: skip
    tokens = chain.carried.tokens if chain else rows_of(feeds)
    return Sensitivity(
        tokens=tokens, kl_mean=whole, kl_foretold=sum(cost for cost, _ in priced), measured=dict(falls),
        overrides=suggested(rows, costs),
    )  # fmt: skip


def of_all_parts(found: Mapping[str, Sensitivity], linears: Mapping[str, Sequence[str]]) -> Sensitivity:
    """What the linears of all parts cost, as one table; each part was measured in the same chain.

    Args:
        found: by part.
        linears: names of the quantized ones, by part; what else was restored is called by its part too.
    """
    first = next(iter(found.values()))
    measured = {
        name if name in linears[part] else f"{part}/{name}": fall
        for part, own in found.items() for name, fall in own.measured.items()
    }  # fmt: skip
    overrides = [override for own in found.values() for override in own.overrides]
    overrides.sort(key=lambda override: -(override.kl_gain or 0.0) / override.more_bytes)
    return Sensitivity(
        tokens=first.tokens, kl_mean=first.kl_mean, measured=measured,
        kl_foretold=sum(own.kl_foretold or 0.0 for own in found.values()), overrides=tuple(overrides[:_MOST_SUGGESTED]),
    )  # fmt: skip


def suggested(rows: Sequence[ValueComparison], costs: Costs) -> tuple[SuggestedOverride, ...]:
    """Overrides that buy back the most KL for each byte, best first.

    What a linear would cost with another scheme is its cost by rounding to nearest, times what the export's way of
    finding weights left of that with the scheme that it has. Experts get none: one kernel computes them while they have
    one scheme.

    Args:
        rows: of the quantized linears, with `kl_cost`.
    """
    items = {item.linear: item for item in costs.items if not item.others}
    priced = [(row, row.kl_cost) for row in rows if row.kl_cost is not None and row.name in items]
    found = [pair for row, cost in priced if (pair := _best(items[row.name], row, cost, costs.kl)) is not None]
    found.sort(key=lambda pair: -pair[0])
    return tuple(better for _, better in found[:_MOST_SUGGESTED])


def _best(
    item: PricedItem, row: ValueComparison, cost: float, kl: Mapping[str, Mapping[str, float]]
) -> tuple[float, SuggestedOverride] | None:
    """The scheme that gains the most for a byte over a linear's present one, and that gain."""
    expected = kl[row.name].get(row.scheme, 0.0)
    left = min(cost / expected, 1.0) if expected else 1.0
    present = next((choice for choice in item.choices if choice.scheme == row.scheme), None)
    now = cost if present is None else left * present.kl  # with what a shared table of embeddings costs
    steps = [
        ((now - left * choice.kl) / (choice.bytes - item.bytes), choice)
        for choice in item.choices
        if choice.bytes > item.bytes and left * choice.kl < now
    ]
    if not steps:
        return None
    gain, best = max(steps, key=lambda step: step[0])
    return gain, SuggestedOverride(
        match=row.name, scheme=best.scheme, instead_of=row.scheme, more_bytes=best.bytes - item.bytes,
        kl_gain=now - left * best.kl,
    )  # fmt: skip
