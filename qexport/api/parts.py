"""What exports of several parts in one folder have in common: one recipe for all, and results that are sums."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..artifact.manifest import Kind, Manifest
from ..artifact.output import WorkFolder
from ..capture.graph import CapturedModel
from ..cost.estimate import both
from ..errors import RecipeError
from ..graph.convolution_sites import convolutions
from ..graph.sites import linears
from ..mixed_precision.sensitivity import of_all_parts
from ..models.agreement import together
from ..models.source import ModelFolder
from ..recipe.recipe import Recipe
from ..recipe.sections import FLOAT
from ..validation.environment import versions
from ..validation.gates import Gates
from ..validation.report import Greedy, LayerComparison, Logits, Placement, Report, Sensitivity, ValueComparison
from .inspection import Inspection
from .result import ExportResult
from .stages.preparing import Preparation


def folder_of(prepared: Preparation) -> ModelFolder:
    """The folder of a model of several parts.

    Raises:
        TypeError: the model comes from elsewhere, so it is none.
    """
    if not isinstance(prepared.source, ModelFolder):
        raise TypeError("a model of several parts comes from a folder")
    return prepared.source


def recipes_of(parts: Mapping[str, CapturedModel], recipe: Recipe) -> dict[str, Recipe]:
    """The recipe for each part: overrides that match in it, and no embedding where it reads no tokens.

    Raises:
        RecipeError: an override matches no linear of any.
    """
    names = {part: _names(captured) for part, captured in parts.items()}
    idle = recipe.unmatched_overrides([name for of_part in names.values() for name in of_part])
    if idle:
        raise RecipeError(f"matches no linear or convolution of the model: {idle[0]!r}", place="overrides")
    found = {}
    for part, captured in parts.items():
        elsewhere = set(recipe.unmatched_overrides(names[part]))
        overrides = tuple(override for override in recipe.overrides if override.match not in elsewhere)
        reads = any(port.name == "input_ids" for port in captured.inputs)
        found[part] = recipe.model_copy(update={"overrides": overrides, **({} if reads else {"embedding": FLOAT})})
    if any(captured.kind == "decoder" for captured in parts.values()):  # and what is for decoders alone is for it
        alone = {method.key: None for method in recipe.methods if method.needs_grouped_attention}
        alone |= {"prefill": None, "tune": None}
        found |= {
            part: found[part].model_copy(update=alone)
            for part, captured in parts.items() if captured.kind != "decoder"
        }  # fmt: skip
    return found


def _names(captured: CapturedModel) -> list[str]:
    graphs = [block.module.graph for block in captured.blocks]
    found = [linear.name for graph in graphs for linear in linears(graph)]
    return [*found, *(name for graph in graphs for name in convolutions(graph))]


def whole_result(kind: Kind | Any, parts: Mapping[str, ExportResult], work: WorkFolder) -> ExportResult:
    """What was written, of all parts together.

    Args:
        kind: see `Manifest.kind`.
    """
    found = {part: replace(result, folder=work.given / part) for part, result in parts.items()}
    results = list(found.values())
    return ExportResult(
        folder=work.given, manifest=_manifest(kind, [result.manifest for result in results]),
        plan=[p for result in results for p in result.plan],
        seconds={f"{part}: {stage}": took for part, result in found.items() for stage, took in result.seconds.items()},
        calibration="; ".join(f"{part}: {result.calibration}" for part, result in found.items()),
        embeddings=[e for result in results for e in result.embeddings],
        convolutions=[c for result in results for c in result.convolutions],
        dense={name: why for result in results for name, why in result.dense.items()},
        rarely_chosen={name: what for result in results for name, what in result.rarely_chosen.items()},
        unseen={name: share for result in results for name, share in result.unseen.items()},
        warnings=tuple(dict.fromkeys(sentence for result in results for sentence in result.warnings)), kept=work.kept,
        reference=together({part: result.reference for part, result in found.items()}), parts=found,
    )  # fmt: skip


def _manifest(kind: Kind | Any, parts: Sequence[Manifest]) -> Manifest:
    """What is in all files together."""
    first, sizes = parts[0], [part.bytes for part in parts]
    return Manifest(
        qexport=first.qexport, target=first.target, kind=kind, dtype=first.dtype, provider=first.provider,
        numerics={name: value for part in parts for name, value in part.numerics.items()},
        linears=tuple(entry for part in parts for entry in part.linears),
        convolutions=tuple(entry for part in parts for entry in part.convolutions),
        blocks=tuple(entry for part in parts for entry in part.blocks),
        bytes={name: sum(size[name] for size in sizes) for name in sizes[0]},
    )  # fmt: skip


def whole_inspection(name: str, parts: Mapping[str, Inspection], attention: str = "") -> Inspection:
    """A dry run of all parts together."""
    found = list(parts.values())
    first = found[0]
    return Inspection(
        model=name, recipe=first.recipe, target=first.target, calibrates=any(part.calibrates for part in found),
        calibration="", smooths=first.smooths, linears=tuple(p for part in found for p in part.linears),
        activations={name: what for part in found for name, what in part.activations.items()},
        slow={name: why for part in found for name, why in part.slow.items()},
        sites=tuple(site for part in found for site in part.sites), attention=attention,
        parameters=sum(part.parameters for part in found),
        bytes={name: sum(part.bytes[name] for part in found) for name in first.bytes},
        estimate=both([part.estimate for part in found]),
        embeddings=tuple(table for part in found for table in part.embeddings),
        convolutions=tuple(c for part in found for c in part.convolutions),
        warnings=tuple(dict.fromkeys(sentence for part in found for sentence in part.warnings)), parts=parts,
    )  # fmt: skip


def _layers(reports: Mapping[str, Report]) -> LayerComparison:
    """Values inside all parts, blocks called by their part too: each has a prologue."""

    def of(part: str, rows: Sequence[ValueComparison], *, named: bool = False) -> list[ValueComparison]:
        moved = [row.model_copy(update={"block": f"{part}/{row.block}"}) if row.block else row for row in rows]
        return [row.model_copy(update={"name": f"{part}/{row.name}"}) for row in moved] if named else moved

    found = {part: report.layers for part, report in reports.items()}
    return LayerComparison(
        tokens=sum(layers.tokens for layers in found.values()),
        linears=tuple(row for part, layers in found.items() for row in of(part, layers.linears)),
        blocks=tuple(row for part, layers in found.items() for row in of(part, layers.blocks, named=True)),
        attentions=tuple(row for part, layers in found.items() for row in of(part, layers.attentions)),
        ranges=tuple(
            row.model_copy(update={"block": f"{part}/{row.block}"}) for part, layers in found.items()
            for row in layers.ranges
        ),
        sessions=sum(layers.sessions for layers in found.values()),
        moved=tuple(row for layers in found.values() for row in layers.moved),
    )  # fmt: skip


def _placement(reports: Mapping[str, Report]) -> Placement:
    """What became of all files."""
    found = [report.placement for report in reports.values()]

    def summed(name: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for placement in found:
            counts.update(getattr(placement, name))
        return dict(counts)

    return Placement(
        provider=found[0].provider, nodes_per_provider=summed("nodes_per_provider"), op_counts=summed("op_counts"),
        kernels=summed("kernels"), unfused=tuple(row for placement in found for row in placement.unfused),
        convolutions=sum(placement.convolutions for placement in found),
    )  # fmt: skip


def _sensitivity(reports: Mapping[str, Report]) -> Sensitivity | None:
    found = {part: report.sensitivity for part, report in reports.items() if report.sensitivity is not None}
    names = {part: [row.name for row in report.layers.linears] for part, report in reports.items()}
    return of_all_parts(found, names) if found else None


def whole_report(
    reports: Mapping[str, Report], *, text: str, own_text: bool, logits: Logits, greedy: Greedy | None, gates: Gates,
    settings: dict[str, Any],
) -> tuple[Report, tuple[str, ...]]:  # fmt: skip
    """What was found in all parts and in their chain, and the problems of the parts.

    Args:
        text, own_text, logits, greedy, settings: see `Report`, of the chain.
        gates: limits that the logits of the chain are held to.
    """
    found = list(reports.values())
    readers = {part: report.reader for part, report in reports.items() if report.reader is not None}
    whole = Report(
        reference=found[0].reference, reader=together(readers) if readers else None, text=text, own_text=own_text,
        layers=_layers(reports), logits=logits, placement=_placement(reports), greedy=greedy,
        outputs=tuple(row for report in found for row in report.outputs),
        activations=tuple(row for report in found for row in report.activations),
        warnings=tuple(dict.fromkeys(sentence for report in found for sentence in report.warnings)),
        gates=gates.of(logits), sensitivity=_sensitivity(reports),
        seconds={f"{part}: {stage}": s for part, report in reports.items() for stage, s in report.seconds.items()},
        settings=settings, versions=versions(), parts=dict(reports),
    )  # fmt: skip
    return whole, tuple(f"{part}: {sentence}" for part, report in reports.items() for sentence in report.problems)
