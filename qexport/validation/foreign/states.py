"""The value that each block of a file hands on to the next: chosen among those that lie between their products."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import NodeProto
from torch import Tensor

from ...artifact.manifest import BlockEntry, Manifest
from ...calibrate.block_activations import Feeds
from ...capture.graph import CapturedModel
from ...graph.edit import dtype_of
from ...graph.views import results_of
from ..reference import TeacherForcing, flat, watch
from ..running import run_values
from .constants import FileGraph
from .matching import Match

_HOPS = 8  # operators behind the last product of a block at most
_ALIKE = 0.5  # see `_alike`; layers that broke leave less, and then the form of a value decides
_ALIKE_ALONE = 0.9  # of modules, whose blocks are unlike: a value in front of an activation is like the one behind it
_SUMS = {"SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}  # the output that holds the sum
_SUM = "qexport/sum_"
_POINTWISE = {
    "Add", "Mul", "Div", "Sub", "Cast", "Reshape", "Identity", "Dropout", "LayerNormalization", "RMSNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Pow", "Sqrt",
    "DequantizeLinear", "QuantizeLinear",
    # What stands between layers of other networks.
    "Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "BatchNormalization", "MaxPool",
    "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Squeeze", "Transpose",
}  # fmt: skip


@dataclass(frozen=True)
class _Candidate:
    """A value behind the last product of a block.

    Attributes:
        form: the operator, its output and the hops to it, by which candidates of several blocks are the same thing.
    """

    value: str
    form: tuple[str, int, int]


def find_states(
    captured: CapturedModel, graph: FileGraph, matches: Sequence[Match], feeds: Sequence[Feeds], manifest: Manifest,
    folder: Path, *, threads: int | None, provider: str | None, write,
) -> tuple[BlockEntry, ...]:  # fmt: skip
    """The values, for every block of the float model that has one in the file.

    Args:
        feeds: a few tokens, on which values are compared.
        write: called after outputs were added to nodes, before anything runs.
    """
    by_block: dict[str, list[Match]] = defaultdict(list)
    for found in matches:
        by_block[found.block].append(found)
    following = [min((m.product.order for m in by_block[b.name]), default=None) for b in captured.blocks]
    candidates: dict[str, list[_Candidate]] = {}
    for index, block in enumerate(captured.blocks[:-1]):
        carried = results_of(block.module.graph)[block.outputs.index(captured.handed_on(block))]
        if not dtype_of(carried).is_floating_point:
            continue
        after = next((o for o in following[index + 1 :] if o is not None), len(graph.order))
        last = max(by_block[block.name], key=lambda m: m.product.order, default=None)
        if last is not None and after < last.product.order:  # a product that reads what it should not
            after = len(graph.order)
        if last is not None:
            candidates[block.name] = _behind(graph, last.product.output, after)
        elif index == 0 and (first := _first(by_block, captured)) is not None:
            candidates[block.name] = _in_front(graph, first.product.input)
    write()
    values = list(dict.fromkeys(c.value for found in candidates.values() for c in found))
    if not values:
        return ()
    made = run_values(folder, manifest, values, feeds, threads, provider)
    scores: dict[str, dict[_Candidate, float]] = {}
    for seen in watch(captured, feeds, set(), lambda block: TeacherForcing(None, {})):
        if seen.block.name in candidates:
            want = flat(seen.output)
            scores[seen.block.name] = {
                found: score for found in candidates[seen.block.name]
                if (score := _alike(want, made[found.value])) is not None
            }  # fmt: skip
    chosen = _chosen(scores, alone=captured.kind == "module")
    return tuple(BlockEntry(name=name, output=value) for name, value in chosen)


def _alike(want: Tensor, got: list[Tensor]) -> float | None:
    """1 where two values are equal; of values that differ by a factor less than their cosine: a norm's input and its
    output have nearly the same direction. None where they have other sizes.
    """
    value = flat(got)
    if value.shape != want.shape:
        return None
    both = want.square().sum() + value.square().sum()
    return float(2 * (want * value).sum() / both.clamp_min(1e-30))


def _chosen(scores: Mapping[str, Mapping[_Candidate, float]], alone: bool) -> list[tuple[str, str]]:
    """(block, value): of the form that fits best in most blocks, else the most alike; alone: in each block that one."""
    if alone:
        best_of = {name: max(found, key=lambda candidate: found[candidate]) for name, found in scores.items() if found}
        return [(name, best.value) for name, best in best_of.items() if scores[name][best] > _ALIKE_ALONE]
    forms: dict[tuple, list[float]] = defaultdict(list)
    for found in scores.values():
        for candidate, score in found.items():
            forms[candidate.form].append(score)
    common = {form: found for form, found in forms.items() if len(found) > len(scores) // 2} or forms
    best = max(common, key=lambda form: statistics.median(common[form]), default=None)
    chosen = []
    for name, found in scores.items():
        most = max(found, key=lambda candidate: found[candidate], default=None)
        usual = next((candidate for candidate in found if candidate.form == best), None)
        if usual is not None and (most is None or found[most] < _ALIKE or found[usual] > found[most] - 0.02):
            chosen.append((name, usual.value))
        elif most is not None and found[most] >= _ALIKE:
            chosen.append((name, most.value))
    return chosen


def _first(by_block: Mapping[str, Sequence[Match]], captured: CapturedModel) -> Match | None:
    for block in captured.blocks:
        if by_block[block.name]:
            return min(by_block[block.name], key=lambda found: found.product.order)
    return None


def _behind(graph: FileGraph, value: str, before: int) -> list[_Candidate]:
    """Values that pointwise operators and norms make of a product's, up to the node with this number."""
    found, waiting, seen = [], [(value, 0)], {value}
    while waiting:
        name, hops = waiting.pop(0)
        for node in graph.readers.get(name, []) if hops < _HOPS else []:
            if node.op_type not in _POINTWISE or graph.order[node.name] >= before:
                continue
            for slot, output in _outputs(graph, node):
                if output not in seen:
                    seen.add(output)
                    found.append(_Candidate(output, (node.op_type, slot, hops)))
                    waiting.append((output, hops + 1))
    return found


def _in_front(graph: FileGraph, value: str) -> list[_Candidate]:
    """Values that a product's input is made of by pointwise operators and norms."""
    found, waiting = [], [(value, 0)]
    while waiting:
        name, hops = waiting.pop(0)
        node = graph.makers.get(name)
        if node is None or hops > 3:
            continue
        found.append(_Candidate(name, (f"in front: {node.op_type}", list(node.output).index(name), hops)))
        if node.op_type in _POINTWISE:
            waiting += [(name, hops + 1) for name in node.input if name in graph.makers and not graph.constant(name)]
    return found


def _outputs(graph: FileGraph, node: NodeProto) -> list[tuple[int, str]]:
    """The values of a node by number, the sum of a norm that adds too, even where the file does not ask for it."""
    slot = _SUMS.get(node.op_type)
    if slot is not None:
        while len(node.output) <= slot:
            node.output.append("")
        if not node.output[slot]:
            node.output[slot] = f"{_SUM}{graph.order[node.name]}"
            graph.makers[node.output[slot]] = node
        return [(0, node.output[0]), (slot, node.output[slot])]
    return [(0, node.output[0])]
