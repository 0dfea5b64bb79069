"""Every quantized linear and every block of the deployed file beside the float model.

The deployed values come out of the deployed file: a temporary model.onnx that names them as additional outputs lies
next to it and shares its data. Values are read for a few blocks at a time, as many as fit a memory budget.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..artifact.manifest import LinearEntry, Manifest
from ..calibrate.fisher import Importance
from ..capture.graph import CapturedModel
from ..progress import StageProgress, no_stage_progress
from ..quant.metrics import cosine, sqnr_db
from ..runtime.session import OptimizedGraph, optimized_graph, unfused
from .anomalies import with_faults
from .placement import expected, moved, placed
from .probes import BUDGET, DeployedValues
from .ranges import input_range, static_limits
from .reference import BlockComparison, Feeds, channelwise, flat, watch
from .report import LayerComparison, ValueComparison
from .report_store import branch_gains
from .running import with_outputs
from .weight_probe import NoiseProbe, weight_faults

_ALIKE = 0.5  # cosine of what a linear reads and what it should: rounding leaves more, unless nothing is left


def compare_layers(
    folder: Path, manifest: Manifest, captured: CapturedModel, feeds: Sequence[Feeds], plain: OptimizedGraph, *,
    rows: int, transformed: bool, threads: int | None = None, provider: str | None = None, budget: int = BUDGET,
    progress: StageProgress = no_stage_progress, importance: Mapping[str, Importance] = MappingProxyType({}),
    faults: Mapping[str, str] | None = None,
) -> LayerComparison:  # fmt: skip
    """Compare the values of an export with the float model's on the same inputs.

    Args:
        feeds: the model's inputs by public name, one dict for each batch.
        plain: the optimized graph of the deployed file.
        rows: tokens (or batch entries, for models without text) in all batches.
        transformed: the export folded factors into linears; see `ValueComparison.rescaled`.
        budget: bytes of deployed values in memory at once.
        importance: of the results of linears, by name; gives `ValueComparison.kl_cost`.
        faults: what is wrong with the weights, by linear, where that is known of a file that nobody here planned, whose
            linears may read other values than they should; None: noise through the weights tells.

    Raises:
        InputError: the folder cannot be written, or its file lacks a value of the manifest.
        RuntimeProblem: ONNX Runtime fails.
    """
    deployed = DeployedValues(
        folder, manifest, captured, feeds, rows=rows, transformed=transformed, threads=threads, provider=provider,
        budget=budget,
    )  # fmt: skip
    everything = dict.fromkeys(value for group in deployed.groups for probe in group for value in probe.values())
    # Additional outputs can only prevent fusions: where all of them leave a linear its operator, some do.
    watched = with_outputs(folder, list(everything))
    strayed = moved(plain, optimized_graph(watched, manifest, provider=provider), manifest)
    limits = static_limits(folder)
    noise = NoiseProbe(folder, manifest, limits, threads, provider) if faults is None else None
    linear_rows: dict[str, ValueComparison] = {}
    block_rows, attention_rows, ranges = [], [], []

    for index, seen in enumerate(watch(captured, feeds, {e.name for e in manifest.readable}, deployed.forced)):
        progress(seen.block.name, index, len(captured.blocks))
        probe, rescaled = deployed.probe, deployed.rescaled
        if noise is None:
            wrong = {**(faults or {}), **misread(probe.linears, seen, deployed.values)}
        else:
            wrong = weight_faults(captured, probe.linears, seen, deployed.values, noise, rescaled, transformed)
        for entry in probe.linears:
            row = _linear_row(entry, deployed.result(entry), seen, entry.name in rescaled)
            felt = importance.get(entry.name)
            cost = felt and felt.kl(deployed.error(entry, seen))
            linear_rows[entry.name] = row.model_copy(update={"fault": wrong.get(entry.name, ""), "kl_cost": cost})
            if entry.input and (name := probe.attentions.get(entry.name)):
                want, own = seen.inputs[entry.name], seen.own_inputs[entry.name]
                # Factors of v's channels, or of a Mul behind, are taken back by the linear.
                measures = _measures(want, own, deployed.values[entry.input], transformed)
                attention_rows.append(ValueComparison(name=name, block=probe.block, rescaled=transformed, **measures))
        for value, names in probe.inputs().items():
            got = deployed.values[value]
            ranges.append(input_range(probe.block, names, seen.inputs[names[0]], got, limits.get(value)))
        if probe.output is not None:
            measures = _measures(seen.output, seen.own_output, deployed.values[probe.output.output])
            block_rows.append(ValueComparison(name=probe.block, block=probe.block, **measures))
    progress("", len(captured.blocks), len(captured.blocks))
    gains, stacked = branch_gains(folder), faults is None or manifest.kind != "module"
    found = [
        placed(linear_rows[entry.name], entry, plain).model_copy(update={"branch_gain_db": gains.get(entry.name)})
        for entry in manifest.readable
    ]
    elsewhere = {
        e.name: f"{there or 'nothing'} instead of {expected(e, there)}" for e, there in unfused(plain, manifest.linears)
    }
    return LayerComparison(
        tokens=rows, linears=with_faults(found, ranges, elsewhere, deployed.behind, stacked), blocks=tuple(block_rows),
        sessions=len(deployed.groups), moved=strayed, attentions=tuple(attention_rows), ranges=tuple(ranges),
    )  # fmt: skip


def misread(
    entries: Sequence[LinearEntry], seen: BlockComparison, values: Mapping[str, Sequence[Tensor]]
) -> dict[str, str]:
    """Linears that read another value than the float model's, everything in front as it is deployed; in words."""
    faults = {}
    for entry in entries:
        want, got = flat(seen.own_inputs[entry.name]), flat(values[entry.input])
        if want.shape != got.shape:
            faults[entry.name] = f"it reads {list(got.shape)} values, and the float model {list(want.shape)}"
        elif (alike := cosine(want, got)) < _ALIKE:
            faults[entry.name] = f"it does not read what the float model reads: the cosine of both is {alike:.2f}"
    return faults


def _linear_row(entry: LinearEntry, value: list[Tensor], seen: BlockComparison, rescaled: bool) -> ValueComparison:
    measures = _measures(seen.linears[entry.name], seen.own_linears[entry.name], value, rescaled)
    return ValueComparison(name=entry.name, block=entry.block, scheme=entry.scheme, rescaled=rescaled, **measures)


def _measures(
    want: Sequence[Tensor], own: Sequence[Tensor], value: Sequence[Tensor], rescaled: bool = False
) -> dict[str, Any]:
    got, whole, alone = flat(value), flat(want), flat(own)
    measures = compare(whole, channelwise(whole, got) if rescaled else got)
    return {**measures, "own_sqnr_db": sqnr_db(alone, channelwise(alone, got) if rescaled else got)}


def compare(want: Tensor, got: Tensor) -> dict[str, float]:
    """sqnr_db, cosine and max_abs_error of two tensors of one shape."""
    return {
        "sqnr_db": sqnr_db(want, got),
        "cosine": cosine(want, got),
        "max_abs_error": float((want - got).abs().max()),
    }
