"""Where the time of a deployed file goes, node by node, from ONNX Runtime's own profile."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from torch import Tensor

from ..artifact.branches import PROMPTS, STEPS
from ..artifact.manifest import CPU, LinearEntry, Manifest
from ..artifact.scratch import scratch_folder
from ..runtime.decoder import Decoder
from ..runtime.embeddings import stand_in
from ..runtime.session import open_session
from .reference import Feeds
from .report import LayerComparison
from .running import run_session

_RUNS = 5  # that count; one more before them does not
_KERNEL = "_kernel_time"  # behind the name of a node, in the name of an event
_HOLDS_OTHERS = ("If", "Loop", "Scan")  # their time is that of the nodes within


@dataclass(frozen=True)
class Times:
    """Shares of the time of all kernels, for prompts and for steps of one token.

    Attributes:
        nodes, step_nodes: by the name of a node; by_op, step_by_op: by operator, the largest first.
    """

    nodes: Mapping[str, float] = field(default_factory=dict)
    by_op: Mapping[str, float] = field(default_factory=dict)
    step_nodes: Mapping[str, float] = field(default_factory=dict)
    step_by_op: Mapping[str, float] = field(default_factory=dict)


def measure(
    folder: Path, manifest: Manifest, *, prompt: Tensor | None = None, feeds: Sequence[Feeds] = (),
    threads: int | None = None, provider: str | None = None,
) -> Times:  # fmt: skip
    """Profile a few runs; medians of each node.

    On other providers than the CPU the host does not wait for kernels, and its times say nothing: there are none then.

    Args:
        prompt: token ids of a decoder, int64 [S].
        feeds: for other models, inputs by public name; the first ones are run.

    Raises:
        InputError, RuntimeProblem: as `open_session` and a run.
    """
    if (provider or manifest.provider) != CPU:
        return Times()
    with scratch_folder() as place:
        session = open_session(folder, manifest, threads=threads, provider=provider, profile_prefix=place / "profile")
        if prompt is None:
            for _ in range(1 + _RUNS):
                run_session(session, feeds[0], [value.name for value in session.get_outputs()])
        else:
            room = manifest.settings.get("max_position_embeddings", len(prompt) + 1 + _RUNS) - 1 - _RUNS
            ids = prompt[None, : max(room, 1)].numpy()
            decoder = Decoder(
                session, manifest.settings, max_length=ids.shape[1] + 1 + _RUNS, embed=stand_in(session)
            )
            for _ in range(1 + _RUNS):
                decoder.reset()
                decoder.run(ids)
            for _ in range(1 + _RUNS):
                decoder.run(ids[:, -1:])
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = _by_run(events)
    prompts, steps = (_shares(runs[start + 1 : start + 1 + _RUNS]) for start in (0, 1 + _RUNS))
    return Times(*prompts, *steps)


def with_times(layers: LayerComparison, manifest: Manifest, times: Times) -> LayerComparison:
    """The layers with the share of each linear; several that are one product share its time by their columns."""
    shares = [_of_linears(manifest, times.nodes, PROMPTS), _of_linears(manifest, times.step_nodes, STEPS)]
    rows = [
        row.model_copy(update={"time_share": shares[0].get(row.name), "step_time_share": shares[1].get(row.name)})
        for row in layers.linears
    ]
    update = {"linears": tuple(rows), "time_by_op": dict(times.by_op), "step_time_by_op": dict(times.step_by_op)}
    return layers.model_copy(update=update)


def _by_run(events: Sequence[dict]) -> list[dict[tuple[str, str], float]]:
    """Microseconds by (node, operator) for every run, in order."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    kernels = sorted(
        (e["ts"], e["name"].removesuffix(_KERNEL), e["args"]["op_name"], e["dur"])
        for e in events
        if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)
    )
    found: list[dict[tuple[str, str], float]] = [defaultdict(float) for _ in runs]
    index = 0
    for begin, node, op, duration in kernels:
        while index < len(runs) and begin > runs[index][1]:
            index += 1
        if index < len(runs) and begin >= runs[index][0] and op not in _HOLDS_OTHERS:
            found[index][node, op] += duration
    return [dict(times) for times in found]


def _shares(runs: Sequence[Mapping[tuple[str, str], float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Shares by node and by operator."""
    typical = {key: median(run.get(key, 0.0) for run in runs) for key in dict.fromkeys(k for run in runs for k in run)}
    whole = sum(typical.values())
    if not whole:
        return {}, {}
    by_op: dict[str, float] = defaultdict(float)
    for (_, op), duration in typical.items():
        by_op[op] += duration / whole
    largest_first = sorted(by_op.items(), key=lambda item: item[1], reverse=True)
    return {node: duration / whole for (node, _), duration in typical.items()}, dict(largest_first)


def _of_linears(manifest: Manifest, nodes: Mapping[str, float], branch: str) -> dict[str, float]:
    """The share of each linear: of its product and of those that are added to it.

    Args:
        branch: prefix of the names of nodes, of linears that are in branches.
    """
    if not nodes:
        return {}

    def names(entry: LinearEntry) -> list[str]:
        prefix = branch if entry.prompt_kernel else ""
        return list(dict.fromkeys(prefix + node for node in (entry.node, *(node for node, _ in entry.parts))))

    columns: Counter[str] = Counter()
    for entry in manifest.linears:
        columns.update({node: entry.shape[0] for node in names(entry)})
    return {
        entry.name: sum(nodes.get(node, 0.0) * entry.shape[0] / columns[node] for node in names(entry))
        for entry in manifest.linears
    }
