"""From costs to a recipe: what there is to choose from, what else is in the file, and the choice as overrides."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..calibrate.block_activations import Feeds
from ..calibrate.fisher import Importance
from ..capture.graph import CapturedModel
from ..errors import InputError, RecipeError
from ..lower.attention_plan import plan_attention
from ..lower.sizes import planned_bytes
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import output_projection, plan_for
from ..progress import StageProgress
from ..quant.formats import IntegerFormat, Scheme, offered
from ..recipe.recipe import Recipe
from ..recipe.sections import AUTO, FLOAT, TIED, Override, only
from .allocate import Allocation, SchemeChoice, within_bytes, within_kl
from .costs import PricedItem, scheme_costs

logger = logging.getLogger(__name__)

_LEAST_SHARE, _MOST_SHARE = 0.05, 1.5  # of the same, by linear: beyond are errors of measurement
_GRAPH_BYTES = 1400  # of model.onnx for each linear and what surrounds it, at most
_JOINING_BYTES = 1500  # of the same, where codes lie in planes that are joined when the file is loaded


class SchemeAllocator:
    """Chooses schemes for what a recipe quantizes.

    Args:
        candidates: the schemes to choose from, of the target, besides the recipe's own that are no integers: which
            integers its kernels are fast with, the target knows.
        float_itemsize: bytes of a number that stays float.
        feeds: what costs are measured on.

    Attributes:
        left: share of the KL that costs add up to which an export is expected to have.

    Raises:
        RecipeError: the recipe quantizes activations, or nothing.
    """

    def __init__(
        self, captured: CapturedModel, recipe: Recipe, candidates: Sequence[str], float_itemsize: int, attention: str,
        feeds: Sequence[Feeds], progress: StageProgress,
    ):  # fmt: skip
        self._recipe, self._plan, self._embeddings = recipe, *plan_for(captured, recipe, float_itemsize)
        self._check()
        self.left = recipe.weights.kl_left
        own = [s.name for s in recipe.schemes if s.interchangeable and not isinstance(s.weight, IntegerFormat)]
        schemes = [scheme for scheme in offered([*candidates, *own]) if recipe.takes(scheme.name)]
        priced = scheme_costs(
            captured, self._plan, self._embeddings, schemes, feeds, float_itemsize, progress,
            clipped=recipe.weights.clips,
        )  # fmt: skip
        planes = {scheme.name for scheme in schemes if scheme.weight.in_planes}
        self._costs = replace(priced, items=tuple(_with_joining(item, planes) for item in priced.items))
        self._shares = [1.0] * len(self._costs.items)
        for item in self._costs.items:
            costs = ", ".join(f"{choice.scheme} {choice.kl:.3g}" for choice in item.choices)
            logger.debug("%s: foretold KL of each scheme: %s", item.linear or "the embedding", costs)
        self._guessed = _GRAPH_BYTES * len(self._plan)  # of the rest, until an export is measured
        self._rest = _rest(captured, self._plan, self._embeddings, float_itemsize, attention) + self._guessed
        projection = output_projection(captured)
        self._projection = projection.name if projection else ""

    def within_bytes(self, most: int) -> Allocation:
        """The least KL in a file of at most so many bytes.

        Raises:
            InputError: the smallest choices take more.
        """
        found = within_bytes(self._choices, most - self._rest)
        if found is None:
            smallest = self.smallest()
            least = self.bytes(smallest)
            if most >= least - self._guessed:  # an export will tell
                return smallest
            raise InputError(
                f"{most:,} bytes are too few: with the smallest schemes the file takes about {least:,}",
                place="max_bytes", remedy="Give more, or quantize what the recipe keeps in float",
            )  # fmt: skip
        return found

    def within_kl(self, most: float) -> Allocation | None:
        """The fewest bytes for at most so much KL, by what exports have measured; None where the best is not enough."""
        return within_kl(self._choices, most / self.left)

    def smallest(self) -> Allocation:
        """The fewest bytes, at any KL."""
        return Allocation(tuple(min(choices, key=lambda c: (c.bytes, c.kl)) for choices in self._choices))

    def best(self) -> Allocation:
        """The least KL, at any size."""
        return Allocation(tuple(min(choices, key=lambda c: (c.kl, c.bytes)) for choices in self._choices))

    def of_rounding(self, allocation: Allocation) -> float:
        """The KL that costs foretell if weights are rounded to nearest, whatever was learnt of the recipe's method."""
        chosen = zip(self._costs.items, allocation.choices, strict=True)
        return sum(next(c.kl for c in item.choices if c.scheme == choice.scheme) for item, choice in chosen)

    def bytes(self, allocation: Allocation) -> int:
        """About the size of the file."""
        return allocation.bytes + self._rest

    def wrong_by(self, more: int) -> None:
        """Learn from an export that its file was so many bytes larger than foretold."""
        self._rest, self._guessed = self._rest + more, 0

    @property
    def importance(self) -> Mapping[str, Importance]:
        """Of the result of every linear that is chosen for, by name."""
        return self._costs.importance

    def learn(self, allocation: Allocation, real: Mapping[str, float], kl: float) -> None:
        """Learn from an export what the recipe's method leaves of the costs of rounding to nearest.

        Args:
            allocation: what was exported; real: cost of each linear in it, where it is known; kl: its mean KL.
        """
        for place, (item, choice) in enumerate(zip(self._costs.items, allocation.choices, strict=True)):
            known = [name for name in item.linears if name in real]
            if known and (expected := sum(self._costs.kl[name][choice.scheme] for name in known)) > 0:
                share = sum(real[name] for name in known) / expected
                self._shares[place] = min(max(share, _LEAST_SHARE), _MOST_SHARE)
        by_name = [{choice.scheme: choice.kl for choice in choices} for choices in self._choices]
        now = sum(known[choice.scheme] for known, choice in zip(by_name, allocation.choices, strict=True))
        self.left = kl / max(now, 1e-12)

    def schemes(self, allocation: Allocation) -> dict[str, str]:
        """The scheme asked for, of every linear that is chosen for, and of a table of embeddings."""
        table = next((e.name for e in self._embeddings if e.scheme is not None), "")
        pairs = zip(self._costs.items, allocation.choices, strict=True)
        return {name: choice.scheme for item, choice in pairs for name in item.linears or (table,)}

    def recipe(self, allocation: Allocation) -> Recipe:
        """The recipe with this choice: the commonest scheme for all, and an override for each other linear."""
        chosen = self.schemes(allocation)
        table = next((e for e in self._embeddings if e.scheme is not None), None)
        embedding = self._recipe.embedding
        if table is not None and not table.linear:
            embedding = chosen.pop(table.name)
        elif embedding == AUTO:
            embedding = TIED if table is not None else FLOAT
        layers = Counter(scheme for name, scheme in chosen.items() if name != self._projection)
        head = chosen.get(self._projection, self._recipe.lm_head)
        made = self._recipe.model_copy(update={
            "name": f"{self._recipe.name}_auto", "description": f"{self._recipe.name}, schemes chosen by their cost",
            "scheme": layers.most_common(1)[0][0] if layers else head, "lm_head": head, "embedding": embedding,
            "overrides": (),
        })  # fmt: skip
        wanted = {p.name: chosen.get(p.name, FLOAT) for p in self._plan}
        others = {
            n: scheme for n, scheme in wanted.items() if scheme != _name(made.scheme_for(n, n == self._projection))
        }
        overrides = tuple(Override(match=only(name), scheme=scheme) for name, scheme in others.items())
        return made.model_copy(update={"overrides": overrides})

    @property
    def _choices(self) -> list[tuple[SchemeChoice, ...]]:
        """The choices of every item, their costs with what the recipe's method is known to leave of them."""
        pairs = zip(self._costs.items, self._shares, strict=True)
        return [tuple(replace(c, kl=c.kl * share) for c in item.choices) for item, share in pairs]

    def _check(self) -> None:
        quantized = [(p.name, p.scheme) for p in self._plan if p.scheme is not None]
        if not quantized:
            raise RecipeError("quantizes nothing, so there is nothing to choose", place=self._recipe.name)
        if others := [(name, scheme) for name, scheme in quantized if not scheme.interchangeable]:
            name, scheme = others[0]
            raise RecipeError(
                f"schemes are chosen among weights in groups, and {name} would be {scheme.name}",
                place=self._recipe.name, remedy="Take compact or another recipe that leaves activations alone",
            )  # fmt: skip


def _with_joining(item: PricedItem, planes: set[str]) -> PricedItem:
    """With the bytes of the graph that joins the planes of codes."""
    more = _JOINING_BYTES * max(len(item.linears), 1)
    choices = tuple(replace(c, bytes=c.bytes + more) if c.scheme in planes else c for c in item.choices)
    return replace(item, choices=choices)


def _rest(
    captured: CapturedModel,
    plan: Sequence[LinearPlan],
    embeddings: Sequence[EmbeddingPlan],
    float_itemsize: int,
    attention: str,
) -> int:
    """Bytes of everything that is not chosen for, without the graph: what stays float, tables of positions."""
    sizes = planned_bytes(
        captured, plan, embeddings, float_itemsize, plan_attention(captured, attention, captured.load)
    )
    quantized = sum(p.bytes for p in plan if p.scheme is not None)
    tables = sum(e.bytes for e in embeddings if e.scheme is not None)
    return sizes["total"] - quantized - tables


def _name(scheme: Scheme | None) -> str:
    return FLOAT if scheme is None else scheme.name
