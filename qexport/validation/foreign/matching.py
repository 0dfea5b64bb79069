"""Which product of a file is which linear of the float model: by the values of the weights first, by names second.

Weights are compared by a few random projections of their rows, so that each is read once and any two are compared at
the cost of a small matmul; a linear may be some rows of a product (packed q, k and v).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...capture.graph import CapturedModel
from ...graph.convolution_sites import products as products_of
from ...graph.sites import Linear
from ...progress import StageProgress
from .products import Product

_PROJECTIONS = 16
# Cosine of two weights, as far as projections tell it. Two bits leave 0.8, factors of smoothing 0.7, chance 0.1.
_ALIKE = 0.5
_FIRST_ROWS = 32  # by which the place of a linear within a product is sought
_TOKEN = re.compile(r"[A-Za-z0-9_]+")
_PACKED = re.compile(r"[qkv]{2,3}")


@dataclass(frozen=True)
class Match:
    """A linear of the float model and where the file has it.

    Attributes:
        block: its block's name; product: the one that computes it; first: its first row there.
        cosine: of its weight and what the file has there, roughly; by: "values", "names" or "order".
        holds: the linear whose weight is really there, where that is another one; else empty.
    """

    linear: Linear
    block: str
    product: Product
    first: int
    cosine: float
    by: str
    holds: str = ""

    @property
    def whole(self) -> bool:
        """Whether the product computes this linear and nothing else."""
        return self.product.weight.shape[0] == self.linear.shape[0]


@dataclass(frozen=True)
class Matches:
    """All of a file.

    Attributes:
        found: in the order of the model; missing: linears that no product computes; others: products that are none.
    """

    found: tuple[Match, ...]
    missing: tuple[str, ...]
    others: tuple[Product, ...]


@dataclass(frozen=True)
class _Place:
    product: Product
    first: int
    cosine: float


def match(captured: CapturedModel, products: Sequence[Product], progress: StageProgress) -> Matches:
    """Find every linear of the float model among the products of a file."""
    wanted = [(found, block.name) for block in captured.blocks for found in products_of(block.module.graph)]
    widths = {found.shape[1] for found, _ in wanted}
    random = {
        width: torch.randn(width, _PROJECTIONS, generator=torch.Generator().manual_seed(width)) for width in widths
    }
    # The products that are as wide as some linear; the others multiply tables, such as positions.
    given = [product for product in products if product.weight.shape[1] in random]
    there = {}
    for index, product in enumerate(given):
        progress("weights of the file", index, len(given) + len(wanted))
        there[product.order] = product.weight.read() @ random[product.weight.shape[1]]
    by_value: dict[str, _Place | None] = {}
    for index, (found, _) in enumerate(wanted):
        progress(found.name, len(given) + index, len(given) + len(wanted))
        sketch = captured.load(found.weight).float().flatten(1) @ random[found.shape[1]]
        alike = [_within(sketch, there[p.order], p) for p in given if p.weight.shape[1] == found.shape[1]]
        fitting = [place for place in alike if place is not None]
        by_value[found.name] = _best(fitting, found.name)
    matched = _decide(wanted, given, by_value)
    used = {found.product.order for found in matched}
    names = {found.linear.name for found in matched}
    return Matches(
        tuple(_in_order(matched)), tuple(found.name for found, _ in wanted if found.name not in names),
        tuple(product for product in given if product.order not in used),
    )  # fmt: skip


def _within(sketch: Tensor, whole: Tensor, product: Product) -> _Place | None:
    """Where the rows [n, r] are most like rows of [N, r]; None where there are too few."""
    n, room = len(sketch), len(whole) - len(sketch)
    if room < 0:
        return None
    first = 0
    if room:
        head = sketch[:_FIRST_ROWS]
        near = torch.nn.functional.normalize(whole, dim=1) @ torch.nn.functional.normalize(head, dim=1).t()
        steps = torch.stack([near[row : row + room + 1, row] for row in range(len(head))])
        first = int(steps.sum(0).argmax())
    part = whole[first : first + n]
    size = (sketch.norm() * part.norm()).clamp_min(1e-30)
    return _Place(product, first, float((sketch * part).sum() / size))


def _best(places: Sequence[_Place], name: str) -> _Place | None:
    """The place that is most like a linear; of several that are as good the one whose name is, or the first."""
    good = [place for place in places if place.cosine > _ALIKE]
    if not good:
        return None
    most = max(place.cosine for place in good)
    alike = [place for place in good if place.cosine > most - 1e-3]
    return max(alike, key=lambda place: hint(name, place.product))


def _decide(
    wanted: Sequence[tuple[Linear, str]], given: Sequence[Product], by_value: dict[str, _Place | None]
) -> list[Match]:
    named = {found.name: _named(found, given) for found, _ in wanted}
    agreeing = [
        place.product.order in {product.order for product in named[name]}
        for name, place in by_value.items() if place and named[name]
    ]  # fmt: skip
    trusted = bool(agreeing) and sum(agreeing) > 0.8 * len(agreeing)
    owners = {(place.product.order, place.first): name for name, place in by_value.items() if place is not None}
    hinted = {product.order for products in named.values() for product in products}
    matched, waiting = [], []
    for found, block in wanted:
        place, said = by_value[found.name], named[found.name] if trusted else []
        if place is not None and (
            not said or place.product.order in {p.order for p in said} or place.product.order not in hinted
        ):
            matched.append(Match(found, block, place.product, place.first, place.cosine, "values"))
        else:
            waiting.append((found, block, said))
    for found, block, said in waiting:
        place = _free(found, said, matched)
        if place is not None:
            holds = owners.get((place.product.order, place.first), "")
            matched.append(
                Match(found, block, place.product, place.first, 0.0, "names", "" if holds == found.name else holds)
            )
    left = [(found, block) for found, block, _ in waiting if found.name not in {m.linear.name for m in matched}]
    return matched + _by_order(left, given, matched)


def _named(linear: Linear, given: Sequence[Product]) -> list[Product]:
    """The products whose names are most like that of a linear; none where no name is."""
    fitting = [p for p in given if p.weight.shape[1] == linear.shape[1] and p.weight.shape[0] >= linear.shape[0]]
    scores = {product.order: hint(linear.name, product) for product in fitting}
    most = max(scores.values(), default=0)
    return [product for product in fitting if most and scores[product.order] == most]


def hint(name: str, product: Product) -> int:
    """How many words of a module's path are in the names around a product; 0 where its last one or a number is not."""
    words = name.split(".")
    numbers, leaf = [word for word in words if word.isdigit()], words[-1]
    best = 0
    for text in product.hints:
        said = _TOKEN.findall(text)
        if [word for word in said if word.isdigit()][: len(numbers)] != numbers:
            continue
        if not any(_covers(word, leaf) for word in said):
            continue
        best = max(best, len(set(words) & set(said)) + 1)
    return best


def _covers(word: str, leaf: str) -> bool:
    """Whether a word of a name is a module's last, or that of several in one: qkv_proj, gate_up_proj."""
    if word == leaf:
        return True
    parts = word.split("_")
    letters = [letter for part in parts if _PACKED.fullmatch(part) for letter in part]
    # A name of one part would be found in many.
    return "_" in leaf and set(leaf.split("_")) <= {*parts, *letters}


def _free(linear: Linear, said: Sequence[Product], matched: Sequence[Match]) -> _Place | None:
    """The first rows that nothing else has, in a product that the names say."""
    n = linear.shape[0]
    for product in said:
        taken = sorted((m.first, m.first + m.linear.shape[0]) for m in matched if m.product.order == product.order)
        start = 0
        for begin, end in [*taken, (product.weight.shape[0], 0)]:
            if begin - start >= n:
                return _Place(product, start, 0.0)
            start = max(start, end)
    return None


def _by_order(left: Sequence[tuple[Linear, str]], given: Sequence[Product], matched: Sequence[Match]) -> list[Match]:
    """Linears and products that are left over, where there are as many of a shape; in the order of both."""
    used = {found.product.order for found in matched}
    found = []
    for shape in dict.fromkeys(linear.shape for linear, _ in left):
        mine = [(linear, block) for linear, block in left if linear.shape == shape]
        free = [product for product in given if product.weight.shape == shape and product.order not in used]
        if len(mine) == len(free):
            found += [
                Match(linear, block, product, 0, 0.0, "order")
                for (linear, block), product in zip(mine, free, strict=True)
            ]
    return found


def _in_order(matched: Sequence[Match]) -> list[Match]:
    """Matches in the order of the model, those out of place in their file put where their place is.

    Layers follow one another in any file. Of linears that do the same in each, one that comes too early or too late has
    the weight of another layer's.
    """
    order = {found.linear.name: index for index, found in enumerate(matched)}
    kinds: dict[str, list[Match]] = {}
    for found in matched:
        kinds.setdefault(re.sub(r"\d+", "#", found.linear.name), []).append(found)
    placed = []
    for same in kinds.values():
        names = sorted(same, key=lambda found: _numbers(found.linear.name))
        places = sorted(same, key=lambda found: found.product.order)
        if len({found.product.order for found in same}) < len(same):  # experts, rows of one product
            placed += same
            continue
        for found, place in zip(names, places, strict=True):
            if found is place:
                placed.append(found)
            else:
                placed.append(
                    replace(
                        found, product=place.product, first=place.first, cosine=0.0, by="order",
                        holds=place.linear.name,
                    )
                )  # fmt: skip
    return sorted(placed, key=lambda found: order[found.linear.name])


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
