"""The dry run: what an export would do to every linear and every value.

It is told from shapes alone, except for decisions that depend on ranges of activations: those take calibration data.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ..calibrate.data import Progress, calibration_batches, needs_data, no_progress, recipe_and_data
from ..calibrate.model_passes import change_model
from ..calibrate.ranges import float_ranges
from ..calibrate.recipe_passes import passes_for
from ..capture.dynamic import DynamicShapes
from ..capture.graph import CapturedModel
from ..capture.module import Inputs
from ..graph.sites import FoldSite, fold_sites, linear_at
from ..lower.attention_plan import check_attention, plan_attention
from ..lower.gqa import GroupedAttention
from ..models.source import ModelFolder
from ..passes.equalization.input_policy import Decision, InputPolicy
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import bytes_by_part, described_embedding, weight_sizes
from ..quant.formats import ActivationFormat
from ..recipe.recipe import Recipe
from ..recipe.registry import Stage
from ..targets.base import target_for
from .exporting import capture, source_of
from .refusals import check_range, decide

Planned = LinearPlan | ConvolutionPlan
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Site:
    """A value that linears read, and where a factor for each of its channels can go.

    Attributes:
        block: the block it is in.
        linears: the linears that read it.
        fold: what takes the factor at no cost: "norm" or the name of the linear in front; None where nothing does.
        why: what stands in the way of a fold; empty where there is one.
        range: the largest magnitude of the value in the float model on calibration data; None where none was run, or
            where no linear quantizes the value.
        decision: what a policy of the recipe makes of that range; None where there is none.
    """

    block: str
    linears: tuple[str, ...]
    fold: str | None
    why: str = ""
    range: float | None = None
    decision: Decision | None = None

    @property
    def reason(self) -> str:
        """The decision with its reason, such as "range 12.3 <= 15: static per-tensor"; empty without one."""
        return "" if self.decision is None else self.decision.sentence(self.range)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "block": self.block, "linears": list(self.linears), "fold": self.fold, "why": self.why,
            "range": self.range, "decision": self.decision and self.decision.what, "reason": self.reason,
        }  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What an export would do.

    Attributes:
        model, recipe, target: what was asked.
        calibrates: whether the export needs calibration data.
        calibration: the data that ranges were taken on; empty when none was run.
        smooths: whether the recipe moves factors from activations into weights.
        linears: the decision for every linear, in order; bytes as in the file of that target.
        activations: by linear name, what becomes of its input, such as "int8 per token".
        slow: by the name of every linear for which the target has several kernels, why the fastest does not take its
            product; empty where it does. Other linears are not in it.
        sites: where factors can go, in order, with ranges and what a policy decides by them.
        attention: of a decoder, "grouped" or "standard" and why; empty for other models.
        parameters: number of weights, tied ones counted once.
        bytes: of the float model in the target's dtype ("float"), and of the export: "quantized" linears, the
            "embedding" with what an output projection reads of it too, the output projection ("lm_head") and the
            "rest" (norms, linears left in float, rotary tables), "total" being their sum.
        embeddings: the decision for every table of token embeddings.
        convolutions: the decision for every convolution, in order; their bytes are among the rest.
        warnings: sentences on what a user may not expect of the model's folder.
    """

    model: str
    recipe: str
    target: str
    calibrates: bool
    calibration: str
    smooths: bool
    linears: tuple[LinearPlan, ...]
    activations: Mapping[str, str]
    slow: Mapping[str, str]
    sites: tuple[Site, ...]
    attention: str
    parameters: int
    bytes: dict[str, int]
    embeddings: tuple[EmbeddingPlan, ...] = ()
    convolutions: tuple[ConvolutionPlan, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        found = asdict(replace(self, linears=(), sites=(), activations={}, embeddings=(), convolutions=(), slow={}))
        del found["activations"], found["slow"]
        found["embeddings"] = [described_embedding(e) for e in self.embeddings]
        found["linears"] = [
            {
                "name": p.name, "block": p.block, "shape": list(p.shape), "bytes": p.bytes, "reason": p.reason,
                "scheme": p.scheme.name if p.scheme else "float", "activation": self.activations[p.name],
                "fast": not self.slow[p.name] if p.name in self.slow else None, "slow": self.slow.get(p.name, ""),
            }
            for p in self.linears
        ]  # fmt: skip
        found["convolutions"] = [
            {
                "name": p.name, "block": p.block, "shape": list(p.shape), "bytes": p.bytes, "reason": p.reason,
                "scheme": p.scheme.name if p.scheme else "float",
            }
            for p in self.convolutions
        ]  # fmt: skip
        found["sites"] = [site.as_dict() for site in self.sites]
        return found


def inspect(
    model: str | os.PathLike | ModelFolder | torch.nn.Module | CapturedModel,
    recipe: str | os.PathLike | Recipe = "w4a16_g32",
    *,
    target: str = "cpu",
    dtype: str | None = None,
    calibrate: bool = False,
    calibration: Any = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    trust_remote_code: bool = False,
    attention: str = "grouped",
    progress: Progress = no_progress,
) -> Inspection:
    """Say what `export` would do with the same arguments, without reading a weight unless it calibrates.

    Decisions that depend on ranges of activations are open without calibration. With it the float model is run, one
    block in memory at a time. An export sees every block behind quantized ones instead, so that a range close to a
    bound of the policy may fall on its other side there.

    Args:
        calibrate: run calibration data through the model for the ranges of quantized activations.
        calibration: the data, as `export` takes it; None takes what the recipe says. Giving it implies `calibrate`.
        dtype, attention, example_inputs, dynamic_shapes: as `export` takes them.
        progress: called with (stage, what, done, total) while calibrating.

    Raises:
        QExportError: as `export`, for everything that shows before weights are quantized; that weights are beyond the
            range of float16 shows when it calibrates.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    calibrate = calibrate or calibration is not None
    recipe, data = recipe_and_data(recipe, calibration)
    check_attention(attention)
    lowering = target_for(target, recipe, dtype)
    width = lowering.dtype.itemsize
    model = source_of(model, recipe, data, calibration is not None, trust_remote_code=trust_remote_code)
    captured = capture(model, example_inputs, dynamic_shapes)
    change_model(captured, recipe)
    decisions = decide(captured, recipe, lowering, attention)
    plan, embeddings, convolutions = decisions.plan, decisions.embeddings, decisions.convolutions
    if calibrate:
        check_range(captured, decisions, lowering.dtype)
    by_name = {p.name: p for p in plan}
    ranges, described = _ranges_of(captured, recipe, by_name, data, progress) if calibrate else ({}, "")
    policy = _policy(recipe, by_name)
    places = [(b.name, s) for b in captured.blocks for s in fold_sites(b.module.graph)]
    sites = [_site(name, site, ranges.get(name, {}).get(site.value), policy) for name, site in places]
    inputs = {p.name: _described(p.scheme and p.scheme.activation) for p in plan}
    for (_, place), site in zip(places, sites, strict=True):
        inputs |= _decided(place, site, policy, by_name)
    sizes = weight_sizes(captured)
    grouping = plan_attention(captured, attention, captured.load)
    tables = sum(t.numel() for t in grouping.tables.values()) if isinstance(grouping, GroupedAttention) else 0
    parts = bytes_by_part(captured, plan, embeddings, width, convolutions)
    parts |= {name: parts[name] + width * tables for name in ("rest", "total")}
    return Inspection(
        model=_called(model), recipe=recipe.name, target=target, calibrates=needs_data(recipe, [*plan, *convolutions]),
        calibration=described,
        smooths=any(method.stage == Stage.EQUALIZE for method in recipe.methods),
        linears=tuple(plan), activations=inputs, sites=tuple(sites),
        slow=lowering.predict_slow([b.module.graph for b in captured.blocks], by_name),
        attention=_attention(captured, grouping), parameters=sum(sizes.values()),
        bytes={"float": width * sum(sizes.values()), **parts}, embeddings=tuple(embeddings),
        convolutions=tuple(convolutions), warnings=tuple(captured.notes),
    )  # fmt: skip


def _called(model) -> str:
    if isinstance(model, CapturedModel):
        return f"{model.folder.name}, {model.settings['part']}" if "part" in model.settings else model.kind
    return type(model).__name__ if isinstance(model, torch.nn.Module) else str(model)


def _attention(captured: CapturedModel, grouping: GroupedAttention | str | None) -> str:
    if captured.kind != "decoder":
        return ""
    return "grouped" if isinstance(grouping, GroupedAttention) else f"standard: {grouping or 'as asked for'}"


def _policy(recipe: Recipe, plan: Mapping[str, LinearPlan]) -> InputPolicy | None:
    """The pass of the export that chooses formats by ranges."""
    return next((p for p in passes_for(recipe, plan) if isinstance(p, InputPolicy)), None)


def _ranges_of(captured: CapturedModel, recipe: Recipe, plan: Mapping[str, LinearPlan], data: Any, progress: Progress):
    """By block name and value the ranges of what quantized linears read, and what they were taken on."""

    def quantizes(site: FoldSite) -> bool:
        return any(_activation(plan, c.name) is not None for c in site.consumers)

    wanted = {b.name: [s.value for s in fold_sites(b.module.graph) if quantizes(s)] for b in captured.blocks}
    if not any(wanted.values()):
        return {}, "nothing was run, because no activation is quantized"
    batches, described = calibration_batches(captured, recipe, data, progress)
    return float_ranges(captured, batches(), wanted, partial(progress, "ranges")), described


def _activation(plan: Mapping[str, LinearPlan], name: str) -> ActivationFormat | None:
    scheme = plan[name].scheme
    return None if scheme is None else scheme.activation


def _site(block: str, site: FoldSite, reach: float | None, policy: InputPolicy | None) -> Site:
    names = tuple(c.name for c in site.consumers)
    decided = policy is not None and reach is not None and not policy.why_left(site)
    found = {"range": reach, "decision": policy.decision(site, reach) if decided else None}
    if site.kind == "explicit":
        return Site(block, names, None, site.why, **found)
    return Site(block, names, "norm" if site.kind == "norm" else linear_at(site.producer).name, **found)


def _decided(place: FoldSite, site: Site, policy: InputPolicy | None, plan: Mapping[str, LinearPlan]) -> dict[str, str]:
    """By linear name what a policy makes of its input, or will make of it."""
    if policy is None or policy.why_left(place):
        return {}
    open_yet = f"decided by calibration: {policy.rule}"
    found = {}
    for name in site.linears:
        if (asked := _activation(plan, name)) is not None:
            chosen = site.decision and _described(replace(asked, kind=site.decision.kind), site.decision.equalize)
            found[name] = chosen or open_yet
    return found


def _described(fmt: ActivationFormat | None, equalized: bool = False) -> str:
    if fmt is None:
        return "float"
    kind = "static" if fmt.kind == "static" else "per token"
    return f"int{fmt.bits} {kind}{', equalized' if equalized else ''}"


def without_index(name: str, block: str) -> tuple[str, int | None]:
    """A name inside a numbered block with `{}` for the number, and the number: `layers.3.q` -> (`layers.{}.q`, 3)."""
    numbers = list(_INDEX.finditer(block))
    if not numbers or not f"{name}.".startswith(f"{block}."):
        return name, None
    last = numbers[-1]
    return f"{name[: last.start(1)]}{{}}{name[last.end(1) :]}", int(last[1])


def compressed(plan: Iterable[Planned], *others: Mapping[str, str]) -> list[tuple[Planned, str, int]]:
    """Linears, or convolutions, that differ in nothing but the number of their layer, as one.

    Args:
        others: by linear name what has to be alike too, such as what becomes of its input.

    Returns:
        (the first of them, a name such as `model.layers.[0-29].mlp.up_proj`, how many they are), in order.
    """
    groups: dict[tuple, tuple[Planned, str, list[int | None]]] = {}
    for p in plan:
        pattern, index = without_index(p.name, p.block)
        key = (pattern, p.shape, p.scheme, p.reason, *(other.get(p.name) for other in others))
        groups.setdefault(key, (p, pattern, []))[2].append(index)
    return [(first, pattern.replace("{}", _ranges(found)), len(found)) for first, pattern, found in groups.values()]


def compressed_sites(sites: Iterable[Site]) -> list[tuple[Site, str, list[Site]]]:
    """Sites that differ in nothing but the number of their layer and their range, as one.

    Returns:
        (the first of them, a name for all their linears, all of them), in order.
    """
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        names, _ = _patterns(site)
        fold = site.fold and without_index(site.fold, site.block)[0]
        because = site.decision and (site.decision.what, _unnumbered(site.decision.why))
        groups.setdefault((names, fold, _unnumbered(site.why), because), []).append(site)
    return [
        (found[0], _joined(key[0]).replace("{}", _ranges([_patterns(s)[1] for s in found])), found)
        for key, found in groups.items()
    ]


def _unnumbered(why: str) -> str:
    """Reasons name nodes, which are numbered through the whole graph."""
    return re.sub(r"_\d+\b", "", why)


def _joined(names: Sequence[str]) -> str:
    """(`a.b.q`, `a.b.k`) -> `a.b.q, k`"""
    parent = names[0].rpartition(".")[0]
    if all(n.rpartition(".")[0] == parent for n in names):
        return ", ".join([names[0], *(n.rpartition(".")[2] for n in names[1:])])
    return ", ".join(names)


def _patterns(site: Site) -> tuple[tuple[str, ...], int | None]:
    parts = [without_index(name, site.block) for name in site.linears]
    return tuple(pattern for pattern, _ in parts), parts[0][1]


def _ranges(numbers: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] -> `[0-2,5]`; one number stands alone."""
    found = sorted(n for n in numbers if n is not None)
    if len(found) == 1:
        return str(found[0])
    runs: list[list[int]] = []
    for n in found:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return f"[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)}]"
