"""Layers that do the same said once: names of linears, convolutions and sites with the numbers of their layers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..plan.linear_plan import Planned
from .inspection import Site

P = TypeVar("P", bound=Planned)
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def without_index(name: str, block: str) -> tuple[str, int | None]:
    """A name inside a numbered block with `{}` for the number, and the number: `layers.3.q` -> (`layers.{}.q`, 3)."""
    numbers = list(_INDEX.finditer(block))
    if not numbers or not f"{name}.".startswith(f"{block}."):
        return name, None
    last = numbers[-1]
    return f"{name[: last.start(1)]}{{}}{name[last.end(1) :]}", int(last[1])


def compressed(plan: Iterable[P], *others: Mapping[str, str]) -> list[tuple[P, str, int]]:
    """Linears, or convolutions, that differ in nothing but the number of their layer, as one.

    Args:
        others: by linear name what has to be alike too, such as what becomes of its input.

    Returns:
        (the first of them, a name such as `model.layers.[0-29].mlp.up_proj`, how many they are), in order.
    """
    groups: dict[tuple[Any, ...], tuple[P, str, list[int | None]]] = {}
    for p in plan:
        pattern, index = without_index(p.name, p.block)
        key = (pattern, p.shape, p.scheme, p.reason, *(other.get(p.name) for other in others))
        groups.setdefault(key, (p, pattern, []))[2].append(index)
    return [(first, pattern.replace("{}", _ranges(found)), len(found)) for first, pattern, found in groups.values()]


def compressed_sites(sites: Iterable[Site]) -> list[tuple[Site, str, list[Site]]]:
    """Sites that differ in nothing but the number of their layer and their range, as one.

    Returns:
        (the first of them, a name for all their linears, all of them), in order.
    """
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        names, _ = _patterns(site)
        fold = site.fold and without_index(site.fold, site.block)[0]
        because = site.decision and (site.decision.what, _unnumbered(site.decision.why))
        groups.setdefault((names, fold, _unnumbered(site.why), because), []).append(site)
    return [
        (found[0], _joined(key[0]).replace("{}", _ranges([_patterns(s)[1] for s in found])), found)
        for key, found in groups.items()
    ]


def _unnumbered(why: str) -> str:
    """Reasons name nodes, which are numbered through the whole graph."""
    return re.sub(r"_\d+\b", "", why)


def _joined(names: Sequence[str]) -> str:
    """(`a.b.q`, `a.b.k`) -> `a.b.q, k`"""
    parent = names[0].rpartition(".")[0]
    if all(n.rpartition(".")[0] == parent for n in names):
        return ", ".join([names[0], *(n.rpartition(".")[2] for n in names[1:])])
    return ", ".join(names)


def _patterns(site: Site) -> tuple[tuple[str, ...], int | None]:
    parts = [without_index(name, site.block) for name in site.linears]
    return tuple(pattern for pattern, _ in parts), parts[0][1]


def _ranges(numbers: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] -> `[0-2,5]`; one number stands alone."""
    found = sorted(n for n in numbers if n is not None)
    if len(found) == 1:
        return str(found[0])
    runs: list[list[int]] = []
    for n in found:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return f"[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)}]"
