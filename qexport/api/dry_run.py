"""The dry run: what an export would do to every linear and every value, told by its first stages.

It is told from shapes alone, except for decisions that depend on ranges of activations: those take calibration data.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch.fx import Node

from ..calibrate.data import calibration_batches, needs_data
from ..calibrate.ranges import float_ranges
from ..calibrate.recipe_passes import passes_for
from ..capture.graph import CapturedModel
from ..graph.sites import FoldSite, fold_sites, linear_at
from ..lower.attention_plan import plan_attention
from ..lower.gqa import GroupedAttention
from ..lower.sizes import planned_bytes
from ..mixed_precision.caches import cache_of
from ..passes.equalization.input_policy import InputPolicy
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import weight_sizes
from ..quant.formats import ActivationFormat
from ..recipe.recipe import Recipe
from ..recipe.registry import Stage
from .describing import described_adapter, described_codes
from .estimating import estimate
from .inspection import Inspection, Site
from .refusals import check_range
from .slower import slower_than_float
from .stages.capturing import capture
from .stages.planning import ExportPlan, plan
from .stages.preparing import Preparation, Source


def dry_run(prepared: Preparation, calibrate: bool) -> Inspection:
    """What an export of one file would do.

    Args:
        calibrate: run the float model on calibration data for the ranges of quantized activations.

    Raises:
        QExportError: as the stages `capture` and `plan`; with `calibrate` also as `refusals.check_range`.
    """
    planned = plan(capture(prepared))
    captured, recipe, decisions = planned.captured, planned.recipe, planned.decisions
    if calibrate:
        check_range(captured, decisions, planned.target.dtype)
    by_name = {p.name: p for p in decisions.plan}
    ranges, described = _ranges_of(planned, by_name) if calibrate else ({}, "")
    policy = _policy(recipe, by_name)
    places = [(b.name, s) for b in captured.blocks for s in fold_sites(b.module.graph)]
    sites = [_site(name, site, ranges.get(name, {}).get(site.value), policy) for name, site in places]
    inputs = {p.name: _described(p.activation) for p in decisions.plan}
    for (_, place), site in zip(places, sites, strict=True):
        inputs |= _decided(place, site, policy, by_name)
    sizes, float_itemsize = weight_sizes(captured), planned.target.dtype.itemsize
    grouping = plan_attention(captured, planned.options.deployed_attention, captured.load)
    parts = planned_bytes(
        captured, decisions.plan, decisions.embeddings, float_itemsize, grouping, decisions.convolutions
    )  # fmt: skip
    kept = cache_of(captured, recipe, planned.target)
    slower = slower_than_float(recipe, decisions.plan, planned.target)
    return Inspection(
        model=_called(prepared.source), recipe=recipe.name, target=planned.target.name,
        calibrates=needs_data(recipe, [*decisions.plan, *decisions.convolutions]), calibration=described,
        smooths=any(method.stage == Stage.EQUALIZE for method in recipe.methods),
        linears=tuple(decisions.plan), activations=inputs, sites=tuple(sites),
        slow=planned.target.predict_slow([b.module.graph for b in captured.blocks], by_name),
        attention=_attention(captured, grouping), parameters=sum(sizes.values()),
        bytes={"float": float_itemsize * sum(sizes.values()), **parts},
        cache={} if kept is None else {"numbers": kept.numbers, "bytes_a_token": kept.bytes},
        estimate=estimate(planned), embeddings=tuple(decisions.embeddings),
        convolutions=tuple(decisions.convolutions), warnings=(*captured.notes, *([slower] if slower else [])),
        codes=described_codes(captured, decisions, planned.target), adapter=described_adapter(captured),
    )  # fmt: skip


def _called(source: Source) -> str:
    if not isinstance(source, CapturedModel):
        return type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)
    part = source.settings.get("part")
    return source.kind if part is None or source.folder is None else f"{source.folder.name}, {part}"


def _attention(captured: CapturedModel, grouping: GroupedAttention | str | None) -> str:
    if captured.kind != "decoder":
        return ""
    return "grouped" if isinstance(grouping, GroupedAttention) else f"standard: {grouping or 'as asked for'}"


def _policy(recipe: Recipe, plan: Mapping[str, LinearPlan]) -> InputPolicy | None:
    """The pass of the export that chooses formats by ranges."""
    return next((p for p in passes_for(recipe, plan) if isinstance(p, InputPolicy)), None)


def _ranges_of(
    planned: ExportPlan, by_name: Mapping[str, LinearPlan]
) -> tuple[Mapping[str, Mapping[Node, float]], str]:
    """By block name and value the ranges of what quantized linears read, and what they were taken on."""

    def quantizes(site: FoldSite) -> bool:
        return any(by_name[c.name].activation is not None for c in site.consumers)

    captured, progress = planned.captured, planned.options.progress
    wanted = {b.name: [s.value for s in fold_sites(b.module.graph) if quantizes(s)] for b in captured.blocks}
    if not any(wanted.values()):
        return {}, "nothing was run, because no activation is quantized"
    batches, described = calibration_batches(captured, planned.recipe, planned.data, progress)
    return float_ranges(captured, batches(), wanted, partial(progress, "ranges")), described


def _site(block: str, site: FoldSite, reach: float | None, policy: InputPolicy | None) -> Site:
    decision = None
    if policy is not None and reach is not None and not policy.why_left(site):
        decision = policy.decision(site, reach)
    found = Site(block, tuple(c.name for c in site.consumers), None, "", reach, decision)
    if site.kind == "explicit":
        return replace(found, why=site.why)
    if site.kind == "norm":
        return replace(found, fold="norm")
    behind = None if site.producer is None else linear_at(site.producer)
    return found if behind is None else replace(found, fold=behind.name)


def _decided(place: FoldSite, site: Site, policy: InputPolicy | None, plan: Mapping[str, LinearPlan]) -> dict[str, str]:
    """By linear name what a policy makes of its input, or will make of it."""
    if policy is None or policy.why_left(place):
        return {}
    open_yet = f"decided by calibration: {policy.rule}"
    found = {}
    for name in site.linears:
        if (asked := plan[name].activation) is not None:
            chosen = site.decision and _described(replace(asked, kind=site.decision.kind), site.decision.equalize)
            found[name] = chosen or open_yet
    return found


def _described(fmt: ActivationFormat | None, equalized: bool = False) -> str:
    if fmt is None:
        return "float"
    kind = "static" if fmt.kind == "static" else "per token"
    numbers = "e4m3" if fmt.e4m3 else f"int{fmt.bits}"
    return f"{numbers} {kind}{', equalized' if equalized else ''}"
