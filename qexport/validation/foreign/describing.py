"""A foreign file in the terms of an export: a manifest of its linears and blocks, and what is wrong by its weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
from torch import Tensor

from ...artifact.manifest import LinearEntry, Manifest
from ...calibrate.block_activations import Feeds
from ...capture.graph import CapturedModel
from ...errors import InputError
from ...graph.convolution_sites import products as products_of
from ...graph.views import Convolution
from ...progress import StageProgress
from ...quant.float_types import FLOAT_TYPES
from ...runtime.session import OptimizedGraph, optimized_graph
from ..report import Foreign, Unfused, WeightRow
from . import notes
from .constants import FileGraph
from .convolutions import CONVOLUTIONS
from .finding import ForeignFile
from .matching import Match, Matches, match
from .ports import CACHE, feeds_for
from .products import Product, products
from .states import find_states
from .tensors import tensor_faults
from .weights import WeightFindings, weight_findings
from .working_copy import make_copy, write

_FEW = 0.3  # of the float model's linears by their values: with fewer it is another model's file
_TOKENS = 16  # on which the values that blocks hand on are found
_SIZES = ("num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class Described:
    """What a working copy of a foreign file is.

    Attributes:
        folder: with the copy; manifest: what is in it, in the terms of an export.
        facts: what its tool and its linears are, for the report.
        faults: what is wrong with weights, in words, by linear; those without a fault have "".
        factors: whether something in front of products divides by factors that their weights carry.
        shapes: of the inputs, by the names that exports have.
    """

    folder: Path
    manifest: Manifest
    facts: Foreign
    faults: Mapping[str, str]
    factors: bool
    shapes: Mapping[str, tuple[int | str | None, ...]]

    @property
    def cached(self) -> bool:
        """Whether it has a cache, so that it can go through a text token by token."""
        return any(name.startswith(CACHE) for name in self.shapes)

    def feeds(self, feeds: Sequence[Feeds]) -> list[Feeds]:
        """What the float model reads, with everything besides that the file takes."""
        return [feeds_for(batch, self.shapes) for batch in feeds]


def describe(
    file: ForeignFile, captured: CapturedModel, folder: Path, feeds: Sequence[Feeds], *, provider: str | None,
    threads: int | None, progress: StageProgress,
) -> Described:  # fmt: skip
    """Make a working copy in `folder` and find the float model in it.

    Args:
        feeds: of the float model, one batch at least.

    Raises:
        InputError: it takes or gives other values than the model, or is another model's.
        RuntimeProblem: ONNX Runtime refuses it.
    """
    model, session = make_copy(file, folder, captured)
    if captured.kind == "decoder" and "logits" not in [value.name for value in model.graph.output]:
        raise InputError("has no logits among its outputs", place=str(file.path))
    shapes = {value.name: _shape(value) for value in model.graph.input}
    graph = FileGraph(model, folder)
    matches = match(captured, products(graph, CONVOLUTIONS), progress)
    _check(file, captured, matches)
    provider = provider or file.provider
    outline = Manifest(
        target="cuda" if "CUDA" in provider else "cpu", kind=captured.kind, dtype=_dtype(model), provider=provider,
        session=session, settings=_settings(captured),
    )  # fmt: skip
    optimized = optimized_graph(folder, outline)
    few = feeds[0] if captured.kind == "module" else {name: _cut(value) for name, value in feeds[0].items()}
    small = [feeds_for(few, shapes)]
    blocks = find_states(
        captured, graph, matches.found, small, outline, folder, threads=threads, provider=provider,
        write=partial(write, model, folder),
    )  # fmt: skip
    found = {one.linear.name: _weight(one, captured) for one in matches.found}
    entries = [_entry(one, notes.kernel(one.product, optimized)[1] or "nothing") for one in matches.found]
    manifest = outline.model_copy(update={"linears": tuple(entries), "blocks": blocks})
    factors = any(weight.factors is not None for weight in found.values())  # which gains are divided by
    if factors:
        wrong = [one for one in matches.found if found[one.linear.name].fault]
        found |= {one.linear.name: _weight(one, captured, smoothed=True) for one in wrong}
    facts = _facts(file, manifest, matches, found, optimized).model_copy(
        update={"tensors": () if factors else tensor_faults(captured, graph)}
    )
    return Described(folder, manifest, facts, {name: weight.fault for name, weight in found.items()}, factors, shapes)


def _cut(value: Tensor) -> Tensor:
    return value[:1, :_TOKENS] if value.dim() == 2 else value[:1]


def _check(file: ForeignFile, captured: CapturedModel, matches: Matches) -> None:
    there = [found for block in captured.blocks for found in products_of(block.module.graph)]
    total, kinds = len(there), "linears"
    if any(Convolution.match(found.node) for found in there):
        kinds += " and convolutions"
    good = sum(found.by == "values" for found in matches.found)
    if not good or good < _FEW * total:
        raise InputError(
            f"is not the reference's: {good} of its {total} {kinds} have weights like those here",
            place=str(file.path), remedy="Give the model that this file was made from",
        )  # fmt: skip


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)


def _dtype(model: onnx.ModelProto) -> str:
    """The dtype of the cache, or of the results."""
    kinds = {kind.onnx: kind.name for kind in FLOAT_TYPES.values()}
    values = [value for value in model.graph.input if value.name.startswith(CACHE)] or list(model.graph.output)
    return next((kinds[t] for value in values if (t := value.type.tensor_type.elem_type) in kinds), "float32")


def _settings(captured: CapturedModel) -> dict[str, object]:
    return {key: captured.settings[key] for key in _SIZES if key in captured.settings}


def _entry(found: Match, kernel: str) -> LinearEntry:
    product, (n, k) = found.product, found.linear.shape
    share = n / product.weight.shape[0]
    return LinearEntry(
        name=found.linear.name, block=found.block, scheme=product.scheme, input=product.input, output=product.output,
        columns=None if found.whole else (found.first, found.first + n), node=product.node.name, kernel=kernel,
        shape=(n, k), bytes=math.ceil(product.weight.bytes * share), reason="as the file has it",
    )  # fmt: skip


def _weight(found: Match, captured: CapturedModel, smoothed: bool = False) -> WeightFindings:
    rows = slice(found.first, found.first + found.linear.shape[0])
    weight = found.product.weight
    step = weight.step() if weight.step is not None else None
    want = captured.load(found.linear.weight).float().flatten(1)
    return weight_findings(found, want, weight.read()[rows], None if step is None else step[rows], smoothed)


def _facts(
    file: ForeignFile, manifest: Manifest, matches: Matches, weights: Mapping[str, WeightFindings],
    optimized: OptimizedGraph,
) -> Foreign:  # fmt: skip
    named: list[tuple[str, Product]] = [(found.linear.name, found.product) for found in matches.found]
    wrong = []
    for name, product in named:
        planned, there = notes.kernel(product, optimized)
        if there != planned:
            wrong.append(Unfused(name=name, expected=planned, found=there))
    quantized = [pair for pair in named if pair[1].quantized]
    said = notes.speed(quantized, optimized, manifest.session, manifest.provider, manifest.dtype)
    return Foreign(
        file=file.path.name, tool=file.tool, matched={
            how: sum(found.by == how for found in matches.found) for how in ("values", "names", "order")
        },
        missing=matches.missing, others=tuple(product.node.name for product in matches.others if product.quantized),
        weights=tuple(
            WeightRow(name=name, sqnr_db=w.sqnr_db, nearest_db=w.nearest_db, unexplained=w.unexplained,
                      factors=w.factors is not None, fault=w.fault) for name, w in weights.items()
        ),
        unfused=tuple(notes.why_unfused(quantized, wrong)), notes=tuple(said),
    )  # fmt: skip
