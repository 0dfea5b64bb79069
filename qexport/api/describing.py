"""What an export writes about itself: what a runtime needs to know, and an account of what was done."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from ..artifact.manifest import BlockEntry, ConvolutionEntry, LinearEntry, Manifest
from ..calibrate.loop import QuantizedBlock
from ..capture.graph import CapturedModel
from ..lower.build import Lowered
from ..models.agreement import ReaderAgreement
from ..passes.base import GraphPass
from ..passes.model.base import ModelResult
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import described_embedding
from ..targets.base import Target


def manifest_of(
    captured: CapturedModel,
    plan: Sequence[LinearPlan],
    convolutions: Sequence[ConvolutionPlan],
    lowered: Lowered,
    target: Target,
    sizes: dict[str, int],
    settings: dict[str, Any],
) -> Manifest:
    """What manifest.json says.

    Args:
        sizes: see `lower.sizes.by_part`; settings: see `Manifest`.
    """
    linears = []
    for p in plan:
        if p.scheme is not None:
            found = lowered.linears[p.name]
            linears.append(LinearEntry(
                name=p.name, block=p.block, scheme=p.scheme.name, input=found.input, output=found.output,
                columns=found.columns, node=found.node, kernel=found.kernel, prompt_kernel=found.prompt_kernel,
                parts=lowered.parts.get(p.name, ()), shape=p.shape, bytes=lowered.bytes[p.name], reason=p.reason,
                fast=None if found.slow is None else not found.slow, slow=found.slow or "",
            ))  # fmt: skip
    return Manifest(
        qexport=version("qexport"), target=target.name, kind=captured.kind, provider=target.provider,
        dtype=str(target.dtype).removeprefix("torch."), session=lowered.session, numerics=target.numerics(),
        genai_provider_options=target.genai_provider_options,
        linears=tuple(linears), convolutions=_convolutions(convolutions),
        blocks=tuple(BlockEntry(name=n, output=o) for n, o in lowered.blocks.items()),
        settings=settings, bytes=sizes,
    )  # fmt: skip


def _convolutions(plan: Sequence[ConvolutionPlan]) -> tuple[ConvolutionEntry, ...]:
    return tuple(
        ConvolutionEntry(name=p.name, block=p.block, scheme=p.scheme.name, shape=p.shape, bytes=p.bytes)
        for p in plan
        if p.scheme is not None
    )


def report_of(
    source: dict[str, Any], plan, embeddings, passes: Sequence[GraphPass], finished: Sequence[QuantizedBlock], seconds,
    calibration: str, ran: str, reference: ReaderAgreement, changes: Mapping[str, ModelResult],
    warnings: Sequence[str] = (), left_out: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What report.json says of the export.

    Args:
        source: see `models.provenance`; plan: of linears and convolutions; passes: all that blocks went through;
            ran: see `runtime.first_run`; reference: how far the float graph is from a witness; changes: what passes
            over the whole model did, by their names; warnings: sentences;
            left_out: tensors of the checkpoint that the model does not read.
    """
    return {
        "export": {
            "source": source,
            "reference": asdict(reference),
            "calibration": calibration,
            "warnings": list(warnings),
            "first_run": ran,
            "left_out": list(left_out),
            "seconds": {k: round(v, 2) for k, v in seconds.items()},
            "float": [{"linear": p.name, "reason": p.reason} for p in plan if p.scheme is None],
            "apart": [{"linear": n, "reason": why} for item in finished for n, why in item.apart.items()],
            "dense": [{"linear": n, "reason": why} for item in finished for n, why in item.dense.items()],
            "embedding": [described_embedding(e) for e in embeddings],
            "model_passes": {name: [asdict(note) for note in found.changed] for name, found in changes.items()},
            "passes": [
                {"name": p.name, "keeps_function": p.preserves_output, "keeps_values": p.preserves_values}
                for p in passes
            ],
            "blocks": [asdict(item.record) for item in finished],
        }
    }
