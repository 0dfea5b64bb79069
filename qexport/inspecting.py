"""The dry run: what an export would do to every linear and every value, told from shapes alone."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .capture.graph import Captured
from .export import capture, needs_data, plan_for, target_for
from .passes.edit import get_tensor
from .passes.plan import LinearPlan, weight_bytes
from .passes.sites import FoldSite, fold_sites, linear_at, linears
from .recipe import Recipe

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Site:
    """A value that linears read, and where a factor for each of its channels can go.

    Attributes:
        block: the block it is in.
        linears: the linears that read it.
        fold: what takes the factor at no cost: "norm" or the name of the linear in front; None where nothing does.
        why: what stands in the way of a fold; empty where there is one.
    """

    block: str
    linears: tuple[str, ...]
    fold: str | None
    why: str = ""


@dataclass(frozen=True)
class Inspection:
    """What an export would do.

    Attributes:
        model, recipe, target: what was asked.
        calibrates: whether the export needs calibration data.
        smooths: whether the recipe moves factors from activations into weights.
        linears: the decision for every linear, in order; bytes as in the file of that target.
        sites: where factors can go, in order.
        parameters: number of weights, tied ones counted once.
        bytes: of the float model in the target's dtype ("float"), and of the export: "quantized" linears and the
            "rest" (embeddings, norms, linears left in float), "total" being their sum.
    """

    model: str
    recipe: str
    target: str
    calibrates: bool
    smooths: bool
    linears: tuple[LinearPlan, ...]
    sites: tuple[Site, ...]
    parameters: int
    bytes: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        found = asdict(replace(self, linears=(), sites=()))
        found["linears"] = [
            {
                "name": p.name, "block": p.block, "shape": list(p.shape), "bytes": p.bytes, "reason": p.reason,
                "scheme": p.scheme.name if p.scheme else "float",
            }
            for p in self.linears
        ]  # fmt: skip
        found["sites"] = [{**asdict(site), "linears": list(site.linears)} for site in self.sites]
        return found


def inspect(
    model: str | os.PathLike | torch.nn.Module,
    recipe: str | os.PathLike | Recipe = "w4a16_g32",
    *,
    target: str = "cpu",
    example_inputs: Sequence[torch.Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Say what `export` would do with the same arguments, without reading a weight.

    Raises:
        QExportError: as `export`, for everything that shows before weights are read.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    width = target_for(target, recipe).dtype.itemsize
    captured = capture(model, example_inputs, trust_remote_code=trust_remote_code)
    plan = [replace(p, bytes=weight_bytes(p, width)) for p in plan_for(captured, recipe)]
    sites = [_site(b.name, s) for b in captured.blocks for s in fold_sites(b.module.graph)]
    sizes = _sizes(captured)
    quantized = {p.name for p in plan if p.scheme is not None}
    taken = {n.weight for b in captured.blocks for n in linears(b.module.graph) if n.name in quantized}
    small = sum(p.bytes for p in plan if p.scheme is not None)
    rest = width * sum(count for name, count in sizes.items() if name not in taken)
    name = type(model).__name__ if isinstance(model, torch.nn.Module) else str(model)
    return Inspection(
        model=name, recipe=recipe.name, target=target,
        calibrates=needs_data(recipe, plan), smooths=recipe.smooth is not None,
        linears=tuple(plan), sites=tuple(sites), parameters=sum(sizes.values()),
        bytes={"float": width * sum(sizes.values()), "quantized": small, "rest": rest, "total": small + rest},
    )  # fmt: skip


def _site(block: str, site: FoldSite) -> Site:
    names = tuple(c.name for c in site.consumers)
    if site.kind == "explicit":
        return Site(block, names, None, site.why)
    if site.kind == "norm":
        return Site(block, names, "norm")
    return Site(block, names, linear_at(site.producer).name)


def _sizes(captured: Captured) -> dict[str, int]:
    """Number of elements of every weight of the checkpoint."""
    names = ((b, n) for b in captured.blocks for n in b.parameters if n not in captured.constants)
    return {n: get_tensor(b.module, n).numel() for b, n in names}


def without_index(name: str, block: str) -> tuple[str, int | None]:
    """A name inside a numbered block with `{}` for the number, and the number: `layers.3.q` -> (`layers.{}.q`, 3)."""
    numbers = list(_INDEX.finditer(block))
    if not numbers or not f"{name}.".startswith(f"{block}."):
        return name, None
    last = numbers[-1]
    return f"{name[: last.start(1)]}{{}}{name[last.end(1) :]}", int(last[1])


def compressed(plan: Iterable[LinearPlan]) -> list[tuple[LinearPlan, str, int]]:
    """Linears that differ in nothing but the number of their layer, as one.

    Returns:
        (the first of them, a name such as `model.layers.[0-29].mlp.up_proj`, how many they are), in order.
    """
    groups: dict[tuple, tuple[LinearPlan, str, list[int | None]]] = {}
    for p in plan:
        pattern, index = without_index(p.name, p.block)
        key = (pattern, p.shape, p.scheme, p.reason)
        groups.setdefault(key, (p, pattern, []))[2].append(index)
    return [(first, pattern.replace("{}", _ranges(found)), len(found)) for first, pattern, found in groups.values()]


def compressed_sites(sites: Iterable[Site]) -> list[tuple[Site, str]]:
    """Sites that differ in nothing but the number of their layer, as one, with a name for all their linears."""
    groups: dict[tuple, tuple[Site, list[int | None]]] = {}
    for site in sites:
        names, index = _patterns(site)
        fold = site.fold and without_index(site.fold, site.block)[0]
        # Reasons name nodes, which are numbered through the whole graph.
        why = re.sub(r"_\d+\b", "", site.why)
        groups.setdefault((names, fold, why), (site, []))[1].append(index)
    return [(site, _joined(key[0]).replace("{}", _ranges(found))) for key, (site, found) in groups.items()]


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
