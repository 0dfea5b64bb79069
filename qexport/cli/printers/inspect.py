"""What `qexport inspect` prints."""

from collections.abc import Sequence

from ...api.compressing import compressed, compressed_sites
from ...api.inspection import Inspection, Site
from ...formatting import megabytes
from ...runtime.readers import RunsOn
from ..console import print_table
from .shared import described, print_fast, sizes_by_part


def print_inspection(found: Inspection, all_layers: bool) -> None:
    """A line for every kind of linear and of site, then totals; of two parts one after the other."""
    if found.parts:
        for part in found.parts.values():
            print_inspection(part, all_layers)
            print()
        return
    plan = (
        [(p, p.name, 1) for p in found.linears]
        if all_layers
        else compressed(found.linears, found.activations, found.slow)
    )
    print(f"{found.model}: {found.recipe} for {found.target}\n")
    if found.adapter:
        print(f"{found.adapter[0].upper()}{found.adapter[1:]}\n")
    if found.codes:
        print(f"{found.codes[0].upper()}{found.codes[1:]}\n")
    columns = ["linear", "how many", "out x in", "scheme", "input", "bytes each", "why"]
    rows = [
        [
            name, count, f"{p.shape[0]} x {p.shape[1]}", p.scheme.name if p.scheme else "float",
            found.activations[p.name], p.bytes, p.reason,
        ]
        for p, name, count in plan
    ]  # fmt: skip
    if found.slow:
        columns.append("fast kernel")
        for row, (p, _, _) in zip(rows, plan, strict=True):
            row.append(found.slow[p.name] or "yes" if p.name in found.slow else "")
    print_table(columns, rows)
    if found.convolutions:
        _print_convolutions(found, all_layers)
    for embedding in found.embeddings:
        tokens, features = embedding.shape
        print(f"\nEmbedding of {tokens} x {features}, {embedding.bytes:,} bytes: {described(embedding)}")
    sites = [(s, ", ".join(s.linears), [s]) for s in found.sites] if all_layers else compressed_sites(found.sites)
    if any(s.range is not None for s in found.sites):
        _print_ranges(sites)
    used = "" if found.smooths else " (this recipe moves none)"
    print(f"\nWhere a factor for each channel can go at no cost{used}:\n")
    print_table(
        ["input of", "a factor goes into", "why nowhere"],
        [
            [name, "nothing" if s.fold is None else s.fold if all_layers else _kind(s.fold), s.why]
            for s, name, _ in sites
        ],
    )
    sizes = found.bytes
    quantized = sum(p.scheme is not None for p in found.linears)
    more = f"and {sum(p.scheme is not None for p in found.convolutions)} of {len(found.convolutions)} convolutions "
    print(
        f"\n{quantized} of {len(found.linears)} linears {more if found.convolutions else ''}quantized; "
        f"{found.parameters:,} weights in all"
    )
    print_fast(list(found.slow.values()))
    print(
        f"{megabytes(sizes['float'])} in the float type of this target -> {megabytes(sizes['total'])}: "
        f"linears {megabytes(sizes['quantized'])}, {sizes_by_part(sizes)}"
    )
    if found.attention:
        print(f"Attention is {found.attention}")
    if found.cache:
        print(f"Keys and values take {found.cache['bytes_a_token']:,} bytes a token, in {found.cache['numbers']}")
    print(f"Its blocks take {found.estimate.sentence()}")
    print("The export calibrates" if found.calibrates else "The export needs no calibration data")
    if found.calibration:
        print(f"Calibration here: {found.calibration}")
    if any(s.range is not None for s in found.sites):
        print("Ranges are the float model's. An export runs every block after quantized ones and may find others")


def _print_convolutions(found: Inspection, all_layers: bool) -> None:
    plan = [(p, p.name, 1) for p in found.convolutions] if all_layers else compressed(found.convolutions)
    print()
    print_table(
        ["convolution", "how many", "weight", "scheme", "bytes each", "why"],
        [
            [name, count, " x ".join(map(str, p.shape)), p.scheme.name if p.scheme else "float", p.bytes, p.reason]
            for p, name, count in plan
        ],
    )


def _print_ranges(sites: Sequence[tuple[Site, str, list[Site]]]) -> None:
    """What values reach, and what a policy makes of that."""
    known = [(s, name, [g.range for g in group if g.range is not None]) for s, name, group in sites]
    seen = [(s, name, reached) for s, name, reached in known if s.range is not None]
    columns, rows = ["input of", "largest magnitude"], [[name, _span(reached)] for _, name, reached in seen]
    if any(s.decision for s, _, _ in seen):
        columns += ["becomes", "because it is"]
        for row, (s, _, _) in zip(rows, seen, strict=True):
            row += [s.decision.what, s.decision.why] if s.decision else ["as in the scheme", ""]
    print("\nRanges of quantized inputs on calibration data:\n")
    print_table(columns, rows)


def _span(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.4g}", f"{max(numbers):.4g}"
    return low if low == high else f"{low} to {high}"


def _kind(fold: str) -> str:
    return "the norm in front" if fold == "norm" else f"the rows of {fold.rpartition('.')[2]}"


def print_runs_on(found: RunsOn) -> None:
    """The kinds of nodes that another runtime has no kernel for."""
    print(f"{found.title}, by a table of {found.version}\n")
    if found.missing:
        rows = [[m.operator, m.count, m.why, m.example] for m in found.missing]
        print_table(["operator", "nodes", "why not", "for example"], rows)
        print()
    count = sum(m.count for m in found.missing)
    left = f"; the other {count} are {found.otherwise}" if count else ""
    print(f"It has kernels for {found.nodes - count} of {found.nodes} nodes{left}")
    for operator, note in found.notes.items():
        print(f"{operator}: {note}")
    if found.varying:
        print(f"It wants fixed shapes, and those of {', '.join(found.varying[:3])} vary")
    if found.missing or found.varying:
        print(f"Take {found.take}")
    print(f"Source: {found.source}")
