"""From costs to a recipe: what there is to choose from, what else is in the file, and the choice as overrides."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..calibrate.block_activations import Feeds
from ..calibrate.fisher import Carried, Importance
from ..capture.graph import CapturedModel
from ..errors import InputError, RecipeError
from ..lower.attention_plan import plan_attention
from ..lower.sizes import planned_bytes
from ..plan.model_plan import output_projection, plan_for, with_table
from ..progress import StageProgress
from ..quant.formats import IntegerFormat, Scheme, offered
from ..recipe.recipe import Recipe
from ..recipe.sections import AUTO, FLOAT, TIED, Override, only
from .allocate import Allocation, SchemeChoice, within_bytes, within_kl
from .caches import UNCOUNTED, CacheChoice, CountedCache
from .costs import PricedItem, scheme_costs

logger = logging.getLogger(__name__)

_LEAST_SHARE, _MOST_SHARE = 0.05, 1.5  # of the same, by linear: beyond are errors of measurement
_GRAPH_BYTES = 1400  # of model.onnx for each linear and what surrounds it, at most
_SPREAD_BYTES = 100  # by which the same differ from one choice to the next, for each linear
_JOINING_BYTES = 1500  # of the same, where codes lie in planes that are joined when the file is loaded


class PricedModel:
    """What schemes cost in a model, or in a part of one that is a file of its own.

    Args:
        candidates: the schemes to choose from, of the target, besides the recipe's own that are no integers: which
            integers its kernels are fast with, the target knows.
        float_itemsize: bytes of a number that stays float.
        feeds: what costs are measured on.
        carried: of a part that hands on to another, or reads of one, see `calibrate.fisher.felt`. Tables of embeddings
            that are no output projection stay as the recipe says there: both parts may have one of their own.
        counted: the cache that the budget counts; None where it counts none.

    Attributes:
        recipe: the one that it was priced with.
        costs: of every scheme.
        caches: how keys and values can be kept.
        rest: bytes of everything that is not chosen for; guessed: those of them that an export has not measured.

    Raises:
        RecipeError: the recipe quantizes activations.
    """

    def __init__(
        self, captured: CapturedModel, recipe: Recipe, candidates: Sequence[str], float_itemsize: int, attention: str,
        feeds: Sequence[Feeds], progress: StageProgress, carried: Carried | None = None,
        counted: CountedCache | None = None,
    ):  # fmt: skip
        recipe = recipe if carried is None else with_table(captured, recipe)
        self.recipe = recipe
        self._plan, found = plan_for(captured, recipe, float_itemsize)
        self._check()
        self._embeddings = found if carried is None else [table for table in found if table.linear]
        own = [s.name for s in recipe.schemes if s.interchangeable and not isinstance(s.weight, IntegerFormat)]
        schemes = [scheme for scheme in offered([*candidates, *own]) if recipe.takes(scheme.name)]
        priced = scheme_costs(
            captured, self._plan, self._embeddings, schemes, feeds, float_itemsize, progress, carried,
            method=recipe.weights, caches=counted.methods if counted else (),
        )  # fmt: skip
        self.caches = counted.choices(captured, priced.caches) if counted else (UNCOUNTED,)
        for cache in self.caches if counted else ():
            logger.debug("a cache of %s: %d bytes, predicted KL %.3g", cache.numbers, cache.bytes, cache.kl)
        planes = {scheme.name for scheme in schemes if scheme.weight.in_planes}
        self.costs = replace(priced, items=tuple(_with_joining(item, planes) for item in priced.items))
        self._shares = [1.0] * len(self.costs.items)
        for item in self.costs.items:
            costs = ", ".join(f"{choice.scheme} {choice.kl:.3g}" for choice in item.choices)
            logger.debug("%s: predicted KL of each scheme: %s", item.linear or "the embedding", costs)
        self.guessed = _GRAPH_BYTES * len(self._plan)  # of the rest, until an export is measured
        attention_plan = plan_attention(captured, attention, captured.load)
        sizes = planned_bytes(captured, self._plan, found, float_itemsize, attention_plan)
        self.rest = sizes["total"] - self._chosen_for() + self.guessed
        projection = output_projection(captured)
        self._projection = projection.name if projection else ""

    @property
    def quantizes(self) -> bool:
        """Whether there is anything to choose for."""
        return any(p.scheme is not None for p in self._plan)

    @property
    def choices(self) -> list[tuple[SchemeChoice, ...]]:
        """The choices of every item, their costs with what the recipe's method is known to leave of them."""
        pairs = zip(self.costs.items, self._shares, strict=True)
        return [tuple(replace(c, kl=c.kl * share) for c in item.choices) for item, share in pairs]

    def learn(self, chosen: Sequence[SchemeChoice], real: Mapping[str, float]) -> None:
        """Learn what the recipe's method leaves of the costs of rounding to nearest.

        Args:
            chosen: for every item, what was exported; real: cost of each linear in it, where it is known.
        """
        for place, (item, choice) in enumerate(zip(self.costs.items, chosen, strict=True)):
            known = [name for name in item.linears if name in real]
            if known and (expected := sum(self.costs.kl[name][choice.scheme] for name in known)) > 0:
                share = sum(real[name] for name in known) / expected
                self._shares[place] = min(max(share, _LEAST_SHARE), _MOST_SHARE)

    def schemes(self, chosen: Sequence[SchemeChoice]) -> dict[str, str]:
        """The scheme asked for, of every linear that is chosen for, and of a table of embeddings."""
        table = next((e.name for e in self._embeddings if e.scheme is not None), "")
        pairs = zip(self.costs.items, chosen, strict=True)
        return {name: choice.scheme for item, choice in pairs for name in item.linears or (table,)}

    def chosen_recipe(self, choices: Sequence[SchemeChoice], cache: CacheChoice) -> Recipe:
        """The recipe with this choice: the commonest scheme for all, and an override for each other linear."""
        chosen = self.schemes(choices)
        table = next((e for e in self._embeddings if e.scheme is not None), None)
        embedding = self.recipe.embedding
        if table is not None and not table.linear:
            embedding = chosen.pop(table.name)
        elif embedding == AUTO:
            embedding = TIED if table is not None else FLOAT
        layers = Counter(scheme for name, scheme in chosen.items() if name != self._projection)
        head = chosen.get(self._projection, self.recipe.lm_head)
        made = self.recipe.model_copy(update={
            "name": f"{self.recipe.name}_auto", "description": f"{self.recipe.name}, schemes chosen by their cost",
            "scheme": layers.most_common(1)[0][0] if layers else head, "lm_head": head, "embedding": embedding,
            "overrides": (), **({} if cache.method is None else {cache.method.key: cache.method}),
        })  # fmt: skip
        wanted = {p.name: chosen.get(p.name, FLOAT) for p in self._plan}
        others = {
            n: scheme for n, scheme in wanted.items() if scheme != _name(made.scheme_for(n, n == self._projection))
        }
        overrides = tuple(Override(match=only(name), scheme=scheme) for name, scheme in others.items())
        return made.model_copy(update={"overrides": overrides})

    def _chosen_for(self) -> int:
        """Bytes of what is chosen for, as the recipe has it."""
        quantized = sum(p.bytes for p in self._plan if p.scheme is not None)
        return quantized + sum(e.bytes for e in self._embeddings if e.scheme is not None)

    def _check(self) -> None:
        quantized = [(p.name, p.scheme) for p in self._plan if p.scheme is not None]
        if others := [(name, scheme) for name, scheme in quantized if not scheme.interchangeable]:
            name, scheme = others[0]
            raise RecipeError(
                f"schemes are chosen among weights in groups, and {name} would be {scheme.name}",
                place=self.recipe.name, remedy="Use compact or another recipe that leaves activations alone",
            )  # fmt: skip


class SchemeAllocator:
    """Chooses schemes for what recipes quantize: one budget for all files of a model.

    Args:
        parts: what schemes cost in each of them.

    Attributes:
        left: share of the KL that costs of weights add up to which an export is expected to have.

    Raises:
        RecipeError: there is nothing to choose for.
    """

    def __init__(self, parts: Sequence[PricedModel]):
        self._parts = parts
        if not any(part.quantizes for part in parts):
            raise RecipeError("quantizes nothing, so there is nothing to choose", place=parts[0].recipe.name)
        weights = parts[0].recipe.weights
        self.left = weights.kl_left_narrowed if weights.clips else weights.kl_left
        self._caches = parts[0].caches
        self._spread = 0

    def foretold(self, allocation: Allocation) -> float:
        """The KL that an export is expected to have."""
        return self.left * allocation.kl + allocation.cache.kl

    def within_bytes(self, most: int) -> Allocation:
        """The least KL in at most so many bytes, of files and of the cache where that is counted.

        Raises:
            InputError: the smallest choices take more.
        """
        choices = self._choices
        found = [
            replace(allocation, cache=cache)
            for cache in self._caches
            if (allocation := within_bytes(choices, most - self._rest - self._spread - cache.bytes)) is not None
        ]
        if not found:
            smallest = self.smallest()
            least = self.bytes(smallest)
            if most >= least - sum(part.guessed for part in self._parts):  # an export will tell
                return smallest
            raise InputError(
                f"{most:,} bytes are too few: with the smallest schemes the file{_with(smallest.cache)} takes about"
                f" {least:,}", place="max_bytes", remedy="Give more, or quantize what the recipe keeps in float",
            )  # fmt: skip
        return min(found, key=self.foretold)

    def within_kl(self, most: float) -> Allocation | None:
        """The fewest bytes for at most so much KL, by what exports have measured; None where the best is not enough."""
        choices = self._choices
        found = [
            replace(allocation, cache=cache)
            for cache in self._caches
            if (allocation := within_kl(choices, (most - cache.kl) / self.left)) is not None
        ]
        return min(found, key=self.bytes) if found else None

    def smallest(self) -> Allocation:
        """The fewest bytes, at any KL."""
        smallest = min(self._caches, key=lambda cache: cache.bytes)
        return Allocation(tuple(min(choices, key=lambda c: (c.bytes, c.kl)) for choices in self._choices), smallest)

    def best(self) -> Allocation:
        """The least KL, at any size."""
        best = min(self._caches, key=lambda cache: cache.kl)
        return Allocation(tuple(min(choices, key=lambda c: (c.kl, c.bytes)) for choices in self._choices), best)

    def of_rounding(self, allocation: Allocation) -> float:
        """The KL that costs foretell if weights are rounded to nearest, whatever was learnt of the recipe's method."""
        chosen = zip((item for part in self._parts for item in part.costs.items), allocation.choices, strict=True)
        weights = sum(next(c.kl for c in item.choices if c.scheme == choice.scheme) for item, choice in chosen)
        return weights + allocation.cache.kl

    def bytes(self, allocation: Allocation) -> int:
        """About the size of the files, and of the cache where that is counted."""
        return allocation.bytes + allocation.cache.bytes + self._rest

    def wrong_by(self, more: int) -> None:
        """Learn from an export that its files were so many bytes larger than foretold."""
        self._parts[0].rest += more
        for part in self._parts:
            part.guessed = 0
        self._spread = _SPREAD_BYTES * sum(len(part.costs.items) for part in self._parts)

    @property
    def importance(self) -> Mapping[str, Importance]:
        """Of the result of every linear that is chosen for, by name."""
        return {name: found for part in self._parts for name, found in part.costs.importance.items()}

    def learn(self, allocation: Allocation, real: Mapping[str, float], kl: float) -> None:
        """Learn from an export what the recipe's method leaves of the costs of rounding to nearest.

        Args:
            allocation: what was exported; real: cost of each linear in it, where it is known; kl: its mean KL.
        """
        for part, chosen in self._of_parts(allocation):
            part.learn(chosen, real)
        by_name = [{choice.scheme: choice.kl for choice in choices} for choices in self._choices]
        now = sum(known[choice.scheme] for known, choice in zip(by_name, allocation.choices, strict=True))
        of_weights = max(kl - allocation.cache.kl, _LEAST_SHARE * kl)
        self.left = of_weights / max(now, 1e-12)

    def schemes(self, allocation: Allocation) -> dict[str, str]:
        """The scheme asked for, of every linear that is chosen for, and of a table of embeddings."""
        return {n: scheme for part, chosen in self._of_parts(allocation) for n, scheme in part.schemes(chosen).items()}

    def recipes(self, allocation: Allocation) -> list[Recipe]:
        """The recipe of each part with this choice."""
        return [part.chosen_recipe(chosen, allocation.cache) for part, chosen in self._of_parts(allocation)]

    def _of_parts(self, allocation: Allocation) -> Iterator[tuple[PricedModel, Sequence[SchemeChoice]]]:
        start = 0
        for part in self._parts:
            stop = start + len(part.costs.items)
            yield part, allocation.choices[start:stop]
            start = stop

    @property
    def _choices(self) -> list[tuple[SchemeChoice, ...]]:
        return [choices for part in self._parts for choices in part.choices]

    @property
    def _rest(self) -> int:
        return sum(part.rest for part in self._parts)


def _with_joining(item: PricedItem, planes: set[str]) -> PricedItem:
    """With the bytes of the graph that joins the planes of codes."""
    more = _JOINING_BYTES * max(len(item.linears), 1)
    choices = tuple(replace(c, bytes=c.bytes + more) if c.scheme in planes else c for c in item.choices)
    return replace(item, choices=choices)


def _with(cache: CacheChoice) -> str:
    return f" with a cache of {cache.bytes:,} bytes" if cache.numbers else ""


def _name(scheme: Scheme | None) -> str:
    return FLOAT if scheme is None else scheme.name
