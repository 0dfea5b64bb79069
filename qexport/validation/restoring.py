"""What each linear costs: the deployed model with the value of one linear, or of the embedding, restored to float.

A model in memory beside the deployed one adds an input to every such value. It is fed zeros, and in turn for one value
the difference between what the float linear makes of the deployed input and what the deployed one makes of it. One
session serves for all, with the deployed weights; of the float model one block is in memory.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from ..artifact.branches import PROMPTS, only
from ..artifact.manifest import MODEL_FILE, LinearEntry, Manifest
from ..capture.graph import CapturedModel
from ..progress import StageProgress, no_stage_progress
from ..runtime.session import ModelInFolder, open_session
from .probes import DeployedValues
from .reference import Feeds, FloatOutputs, channel_factors, flat, rows_of, watch
from .running import run_session

_PREFIX = "correction of "


@dataclass(frozen=True)
class Judged:
    """How outputs of a part of a model become the logits that tell what an error in it costs.

    Attributes:
        wanted: logits of the float model, [rows, vocabulary] for each batch.
        outputs: public names of what the part makes, a float first.
        logits: called with the number of a batch and these outputs of the deployed part; the deployed logits of the
            same shape.
    """

    wanted: Sequence[Tensor]
    outputs: Sequence[str] = ("logits",)
    logits: Callable[[int, Feeds], Tensor] = lambda batch, made: made["logits"].flatten(0, 1)


def kl_costs(
    folder: Path, manifest: Manifest, captured: CapturedModel, feeds: Sequence[Feeds], *, transformed: bool,
    names: Collection[str] | None = None, threads: int | None = None, provider: str | None = None,
    progress: StageProgress = no_stage_progress, judged: Judged | None = None,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """The mean KL of the deployed model, and by how much it falls when one linear's value is the float one.

    A fall is measured among the errors of all other linears, so it may be below zero for one that costs little.

    Args:
        feeds: the inputs by public name, one dict for each batch; of a part of a model what the deployed parts in front
            of it make.
        names: of the linears to restore; None for all.
        transformed: the export folded factors into linears; their values are restored up to one factor a channel.
        judged: of a part of a model; None for a decoder in one file.

    Returns:
        (KL over the tokens of all batches, falls by name of the linear; the first block's name where it quantizes the
        embedding).

    Raises:
        InputError, RuntimeProblem: as `compare_layers`.
    """
    judged = judged or Judged(float_logits(captured, feeds))
    rows = rows_of(feeds)
    deployed = DeployedValues(
        folder, manifest, captured, feeds, rows=rows, transformed=transformed, threads=threads, provider=provider,
    )  # fmt: skip
    table = _embedding(folder, captured, manifest)
    entries = {entry.name: entry for entry in manifest.readable if names is None or entry.name in names}
    values = [entry.output for entry in entries.values()] + ([table] if table else [])
    model = _correctable(folder, values, judged.outputs[0])
    session = open_session(model, manifest, threads=threads, provider=provider)
    corrected = _Corrected(session, feeds, judged)
    whole, falls = corrected.kl(), {}
    for seen in watch(captured, feeds, {entry.name for entry in manifest.readable}, deployed.forced):
        probe = deployed.probe
        if table and probe.output is not None and probe.output.output == table:
            differences = _minus(seen.output, deployed.values[table])
            falls[probe.block] = whole - corrected.kl(table, differences)
        for entry in (entry for entry in probe.linears if entry.name in entries):
            progress(entry.name, len(falls), len(values))
            want, got = seen.own_linears[entry.name], deployed.result(entry)
            if entry.name in deployed.rescaled:
                factors = channel_factors(flat(want), flat(got))
                want = [value / factors for value in want]
            differences = _in_columns(entry, _minus(want, got), deployed)
            differences = [deployed.orders.in_file(entry.output, difference) for difference in differences]
            falls[entry.name] = whole - corrected.kl(entry.output, differences)
    progress("", len(values), len(values))
    return whole, falls


def _minus(want: Sequence[Tensor], got: Sequence[Tensor]) -> list[Tensor]:
    return [w - g.float() for w, g in zip(want, got, strict=True)]


def _in_columns(entry: LinearEntry, differences: Sequence[Tensor], deployed: DeployedValues) -> list[Tensor]:
    """The same in the columns of a value that several linears share, and zeros beside them."""
    if entry.columns is None:
        return list(differences)
    width = deployed.values[entry.output][0].shape[-1]
    start, stop = entry.columns
    return [torch.nn.functional.pad(difference, (start, width - stop)) for difference in differences]


def _embedding(folder: Path, captured: CapturedModel, manifest: Manifest) -> str:
    """The value of a quantized embedding, where it is what the first block hands on; else empty."""
    output = next((entry.output for entry in manifest.blocks if entry.name == captured.blocks[0].name), None)
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    gathered = {node.output[0] for node in graph.node if node.op_type == "GatherBlockQuantized"}
    return output if output is not None and output in gathered else ""


def _correctable(folder: Path, values: Collection[str], output: str) -> ModelInFolder:
    """The model of a folder in which every named value gets an addend from outside, in the type of an output."""
    model = only(onnx.load(folder / MODEL_FILE, load_external_data=False), PROMPTS)
    graph = model.graph
    wanted, nodes = set(values), []
    for node in graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in wanted:
                node.output[place] = f"{name} before"
                nodes.append(onnx.helper.make_node("Add", [node.output[place], _PREFIX + name], [name]))
    element = next(value.type.tensor_type.elem_type for value in graph.output if value.name == output)
    graph.input.extend(onnx.helper.make_tensor_value_info(_PREFIX + name, element, None) for name in wanted)
    del graph.node[:]
    graph.node.extend(nodes)
    return ModelInFolder(folder, model.SerializeToString())


def float_logits(captured: CapturedModel, feeds: Sequence[Feeds]) -> list[Tensor]:
    """Logits of the float model, [rows, vocabulary] for each batch."""
    reference = FloatOutputs(captured, feeds, ("logits",))
    try:
        return [reference.outputs(batch)["logits"].flatten(0, 1) for batch in range(len(feeds))]
    finally:
        reference.close()


class _Corrected:
    """The deployed model with corrections, judged by the float model's logits."""

    def __init__(self, session: ort.InferenceSession, feeds: Sequence[Feeds], judged: Judged):
        self._session, self._judged = session, judged
        zeros = {value.name: torch.zeros(1) for value in session.get_inputs() if value.name.startswith(_PREFIX)}
        self._feeds = [{**batch, **zeros} for batch in feeds]
        # KL is the sum of p log p - p q, plus log sum exp q: of the float model only two terms are kept.
        self._likely = [torch.softmax(value, -1) for value in judged.wanted]
        pairs = zip(self._likely, judged.wanted, strict=True)
        self._entropy = [(likely * torch.log_softmax(value, -1)).sum(-1) for likely, value in pairs]

    def kl(self, value: str = "", corrections: Sequence[Tensor] = ()) -> float:
        """Mean KL(float || deployed) in nats, with what is added to a value for each batch."""
        found = []
        for batch, feeds in enumerate(self._feeds):
            given = feeds | ({_PREFIX + value: corrections[batch]} if value else {})
            made = run_session(self._session, given, self._judged.outputs)
            logits = self._judged.logits(batch, made).float()
            cross = torch.einsum("tv,tv->t", self._likely[batch], logits)
            found.append(self._entropy[batch] - cross + torch.logsumexp(logits, -1))
        return float(torch.cat(found).double().mean())
