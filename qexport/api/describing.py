"""What an export writes about itself: what a runtime needs to know, and an account of what was done."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from ..artifact.manifest import BlockEntry, ConvolutionEntry, LinearEntry, Manifest
from ..artifact.names import public_name
from ..capture.graph import CapturedModel
from ..models.provenance import origin
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.kept_codes import kept_codes
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import described_embedding
from ..recipe.recipe import Recipe
from ..targets.base import Target
from .refusals import Decisions
from .slower import slower_than_float
from .stages.lowering import Lowering


def manifest_of(made: Lowering, sizes: Mapping[str, int]) -> Manifest:
    """What manifest.json says.

    Args:
        sizes: see `lower.sizes.by_part`.
    """
    lowered, target = made.lowered, made.target
    linears = []
    for p in made.decisions.plan:
        if p.scheme is not None:
            found = lowered.linears[p.name]
            reads, makes = found.orders
            linears.append(LinearEntry(
                name=p.name, block=p.block, scheme=p.scheme.name, input=found.input, output=found.output,
                columns=found.columns, node=found.node, kernel=found.kernel, prompt_kernel=found.prompt_kernel,
                parts=lowered.parts.get(p.name, ()), shape=p.shape, input_order=reads, result_order=makes,
                bytes=lowered.bytes[p.name], reason=p.reason,
                fast=None if found.slow is None else not found.slow, slow=found.slow or "",
            ))  # fmt: skip
    numerics = target.numerics(made.settings.get("kv_cache_bits"))
    if slower := slower_than_float(made.recipe, made.decisions.plan, target):
        numerics |= {"slower_than_float": slower}
    return Manifest(
        qexport=version("qexport"), target=target.name, kind=made.captured.kind, provider=target.provider,
        dtype=str(target.dtype).removeprefix("torch."), session=lowered.session, numerics=numerics,
        genai_provider_options=target.genai_provider_options,
        linears=tuple(linears), convolutions=_convolutions(made.decisions.convolutions),
        blocks=tuple(BlockEntry(name=n, output=o) for n, o in lowered.blocks.items()),
        settings=dict(made.settings), bytes=dict(sizes),
    )  # fmt: skip


def _convolutions(plan: Sequence[ConvolutionPlan]) -> tuple[ConvolutionEntry, ...]:
    return tuple(
        ConvolutionEntry(name=p.name, block=p.block, scheme=p.scheme.name, shape=p.shape, bytes=p.bytes)
        for p in plan
        if p.scheme is not None
    )


def described_adapter(captured: CapturedModel) -> str:
    """What is merged into the weights; empty where nothing is."""
    adapter = captured.folder.adapter if captured.folder else None
    return "" if adapter is None else adapter.sentence


def described_codes(captured: CapturedModel, decisions: Decisions, target: Target) -> str:
    """What becomes of codes that the checkpoint holds; empty where its weights are float or become float."""
    codes = captured.folder.codes if captured.folder else None
    return "" if codes is None else kept_codes(codes.described, decisions.plan, target.dtype)


def report_of(made: Lowering, ran: str, seconds: Mapping[str, float], warnings: Sequence[str]) -> dict[str, Any]:
    """What report.json says of the export.

    Args:
        ran: see `runtime.first_run`; seconds: by stage; warnings: sentences.
    """
    captured, decisions = made.captured, made.decisions
    planned: list[LinearPlan | ConvolutionPlan] = [*decisions.plan, *decisions.convolutions]
    return {
        "export": {
            "source": origin(captured.folder) if captured.folder else {"name": type(made.source).__name__},
            "reference": asdict(made.agreement),
            "codes": described_codes(captured, decisions, made.target),
            **({"adapter": told} if (told := described_adapter(captured)) else {}),
            "calibration": made.described,
            **({"tuned": asdict(made.tuned)} if made.tuned is not None else {}),
            "warnings": list(warnings),
            "first_run": ran,
            "left_out": list(captured.left_out),
            "seconds": dict(seconds),
            "float": [{"linear": p.name, "reason": p.reason} for p in planned if p.scheme is None],
            "apart": [{"linear": n, "reason": why} for block in made.lowered.graphs for n, why in block.apart.items()],
            "dense": [{"linear": n, "reason": why} for block in made.lowered.graphs for n, why in block.dense.items()],
            "embedding": [described_embedding(e) for e in decisions.embeddings],
            "model_passes": {name: [asdict(note) for note in found.changed] for name, found in made.changes.items()},
            "passes": [
                {"name": p.name, "keeps_function": p.preserves_output, "keeps_values": p.preserves_values}
                for p in made.passes
            ],
            "blocks": [asdict(item.record) for item in made.blocks],
        }
    }


def published(recipe: Recipe) -> Recipe:
    """The recipe as it travels with the export: a calibration text by its name, not by where it lay."""
    return recipe.with_calibration(source=public_name(recipe.calibration.source))
