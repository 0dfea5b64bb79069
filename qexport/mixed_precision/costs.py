"""What every scheme of every linear would cost, in bytes and in KL, from one pass through the float model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ..calibrate.block_activations import Feeds
from ..calibrate.fisher import BlockGradients, Carried, Importance, felt
from ..capture.graph import CapturedModel
from ..device import CPU
from ..graph.edit import get_tensor, set_tensor
from ..passes.moe_coverage import of_experts
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..progress import StageProgress, no_stage_progress
from ..quant.formats import Scheme, SteppedFormat
from ..recipe.methods import CacheMethod, WeightMethod
from .allocate import SchemeChoice

_ROWS = 24  # of a weight, that say what narrowed ranges leave


@dataclass(frozen=True)
class PricedItem:
    """What gets a scheme of its own: a linear, an output projection and the table it shares, or a table alone.

    Attributes:
        linear: its name; empty for a table alone.
        choices: what each scheme costs, its name as asked for.
        bytes: what the plan's scheme takes.
        others: linears of the same experts, which get the same scheme: one kernel computes them only then.
    """

    linear: str
    choices: tuple[SchemeChoice, ...]
    bytes: int
    others: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all; none for a table alone."""
        return (self.linear, *self.others) if self.linear else ()


@dataclass(frozen=True)
class Costs:
    """What schemes cost.

    Attributes:
        items: everything that the recipe quantizes.
        importance: of the result of each of those linears, by name.
        kl: of each linear by itself, by name and scheme; "" is the table of embeddings.
        caches: of a cache kept by each method that was asked about, in their order.
    """

    items: tuple[PricedItem, ...]
    importance: Mapping[str, Importance]
    kl: Mapping[str, Mapping[str, float]]
    caches: tuple[float, ...] = ()


def scheme_costs(
    captured: CapturedModel, plan: Sequence[LinearPlan], embeddings: Sequence[EmbeddingPlan], schemes: Sequence[Scheme],
    feeds: Sequence[Feeds], float_itemsize: int = 4, progress: StageProgress = no_stage_progress,
    carried: Carried | None = None, *, method: WeightMethod | None = None, caches: Sequence[CacheMethod] = (),
) -> Costs:  # fmt: skip
    """Cost of rounding to nearest with each scheme, for everything that a plan quantizes.

    Args:
        captured: what makes logits, or a part in front of that.
        plan, embeddings: say what is quantized, and what shares a table.
        schemes: weight-only ones, in groups.
        feeds: inputs of the decoder by public name, one dict for each batch.
        float_itemsize: bytes of a number that stays float.
        carried: of a model of several parts, see `felt`.
        method: finds the weights, in ranges that it narrows where that makes errors smaller, or in whole ones; None:
            in whole ones.
        caches: ways to keep keys and values.
    """
    quantized = {p.name: p for p in plan if p.scheme is not None}
    table = next((e for e in embeddings if e.scheme is not None), None)
    clips, by_inputs = (method.clips, method.clips_by_inputs) if method else (False, False)
    kl: dict[str, dict[str, float]] = {}
    importance: dict[str, Importance] = {}
    of_caches = [0.0] * len(caches)
    for found in felt(captured, feeds, progress, carried, caches=bool(caches)):
        for kept, (place, way) in product(found.kept, enumerate(caches)):
            of_caches[place] += kept.kl(way.rounded(kept.by_head))
        for linear, inputs, felt_there in found.linears:
            if linear.name in quantized:
                weight = get_tensor(found.block.module, linear.weight)
                importance[linear.name] = felt_there.to(CPU)
                features = felt_there.of_features(inputs)
                rows = weight[_drawn_rows(felt_there.columns)]
                kl[linear.name] = {
                    name: felt_there.kl_of_weight(features, _difference(weight, fitted))
                    * (_left_by_narrowing(rows, fitted, features, by_inputs) if clips else 1.0)
                    for name, fitted in _fitting(schemes, linear.shape[1]).items()
                }
        if table is not None and found.block.name == table.block and found.output is not None:
            fitting = _of_tables(schemes, table)
            numbers = get_tensor(found.block.module, table.weight)
            rows, alike = numbers[:: max(len(numbers) // _ROWS, 1)], numbers.new_ones(numbers.shape[1])
            kl[""] = {
                name: found.output.kl(_moved(found, table.weight, fitted))
                * (_left_by_narrowing(rows, fitted, alike, False) if clips else 1.0)
                for name, fitted in fitting.items()
            }
    owners = [linear for linear in quantized.values() if not linear.shares]
    everywhere = {linear.name: _of_all_uses(linear, quantized.values(), kl) for linear in owners}
    priced = everywhere if table is None else {**everywhere, "": kl.get("", {})}
    experts = {linear.name for block in captured.blocks for linear in of_experts(block.module.graph)}
    items = _together(
        [_item(linear, schemes, priced, table, float_itemsize) for linear in owners], experts, quantized
    )
    if table is not None and not table.linear:
        sizes = [
            (name, fitted.bytes(table.shape, float_itemsize)) for name, fitted in _of_tables(schemes, table).items()
        ]
        choices = tuple(SchemeChoice(name, size, kl[""][name]) for name, size in sizes)
        items.append(PricedItem("", choices, table.bytes))
    return Costs(tuple(items), importance, kl, tuple(of_caches))


def _of_all_uses(
    owner: LinearPlan, plan: Iterable[LinearPlan], kl: Mapping[str, Mapping[str, float]]
) -> Mapping[str, float]:
    """KL by scheme of one set of codes, at all linears that read it."""
    readers = [kl[linear.name] for linear in plan if owner.name in (linear.name, linear.shares)]
    return {scheme: sum(costs[scheme] for costs in readers) for scheme in readers[0]}


def _item(
    linear: LinearPlan, schemes: Sequence[Scheme], kl: Mapping[str, Mapping[str, float]], table: EmbeddingPlan | None,
    float_itemsize: int,
) -> PricedItem:  # fmt: skip
    own = kl[linear.name]
    if table is not None and table.linear == linear.name:
        choices = tuple(
            SchemeChoice(name, fitted.bytes(table.shape, float_itemsize), own[name] + kl[""][name])
            for name, fitted in _of_tables(schemes, table).items()
        )
        return PricedItem(linear.name, choices, table.bytes)
    fitting = _fitting(schemes, linear.shape[1])
    choices = tuple(
        SchemeChoice(n, fitted.bytes(linear.shape, float_itemsize), own[n]) for n, fitted in fitting.items()
    )
    return PricedItem(linear.name, choices, linear.bytes)


def _together(items: Sequence[PricedItem], experts: set[str], plan: Mapping[str, LinearPlan]) -> list[PricedItem]:
    """The experts of a block as one item, in the place of the first of them."""
    found: dict[str, PricedItem] = {}
    for item in items:
        key = plan[item.linear].block if item.linear in experts else item.linear
        if key not in found:
            found[key] = item
            continue
        before = found[key]
        known = {choice.scheme: choice for choice in before.choices}
        pairs = ((known[other.scheme], other) for other in item.choices if other.scheme in known)
        choices = tuple(replace(one, bytes=one.bytes + other.bytes, kl=one.kl + other.kl) for one, other in pairs)
        found[key] = replace(
            before, choices=choices, bytes=before.bytes + item.bytes, others=(*before.others, item.linear)
        )
    return list(found.values())


def _fitting(schemes: Sequence[Scheme], in_features: int, whole: bool = False) -> dict[str, Scheme]:
    """By the name of a scheme what a weight of this width can take of it; without schemes that it cannot take.

    Args:
        whole: the last group may not be shorter than the others.
    """
    found = {scheme.name: scheme.fit(in_features, whole)[0] for scheme in schemes}
    return {name: fitted for name, fitted in found.items() if fitted is not None}


def _of_tables(schemes: Sequence[Scheme], table: EmbeddingPlan) -> dict[str, Scheme]:
    return _fitting([scheme for scheme in schemes if scheme.table], table.shape[1], whole=True)


def _difference(weight: Tensor, scheme: Scheme) -> Tensor:
    return scheme.weight.rounded(weight).sub_(weight)


def _drawn_rows(columns: Tensor) -> Tensor:
    """Numbers of rows of a weight, each as often as its channel counts, so that all that are drawn count the same.

    Args:
        columns: of the importance of its channels.
    """
    places = (torch.arange(_ROWS, device=columns.device) + 0.5) / _ROWS
    return torch.searchsorted(columns.double().cumsum(0), places.double()).clamp_max_(len(columns) - 1)


def _left_by_narrowing(rows: Tensor, scheme: Scheme, features: Tensor, by_inputs: bool) -> float:
    """The share of what rounding a weight costs that is left where its groups have the best ranges.

    It differs between schemes (of 3 bits in groups of 64 .56 of the squared error is left where they are symmetric, .81
    with zero points), and to look for the ranges of all rows takes longer than everything else: some rows say it.

    Args:
        rows: of the weight, see `_drawn_rows`.
        features: how much errors count by input feature, float32 [in_features].
        by_inputs: whether the search weighs them too.
    """
    fmt = scheme.weight
    if not isinstance(fmt, SteppedFormat):
        return 1.0
    whole = float((_difference(rows, scheme).square() @ features).sum())
    fmt = fmt.for_weight(rows)
    scale, zero_point = fmt.clipped_scales(rows, features if by_inputs else None)
    narrowed = fmt.decode(fmt.encode(rows, scale, zero_point), scale, zero_point).sub_(rows)
    return float((narrowed.square() @ features).sum()) / whole if whole > 0 else 1.0


def _moved(found: BlockGradients, weight: str, scheme: Scheme) -> Tensor:
    """The error [rows, channels] of what a block hands on, with a rounded table of embeddings."""
    module = found.block.module
    table = get_tensor(module, weight)

    def run() -> Tensor:
        with torch.no_grad():
            results = [module(*inputs)[found.handed] for inputs in found.inputs]
        return torch.cat([value.reshape(-1, value.shape[-1]) for value in results])

    plain = run()
    set_tensor(module, weight, table + _difference(table, scheme))
    try:
        return run() - plain
    finally:
        set_tensor(module, weight, table)
