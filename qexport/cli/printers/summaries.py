"""Results of the library as text for people; the command line prints nothing else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...api.auto import AutoResult
from ...api.compressing import compressed, compressed_sites
from ...api.inspection import Inspection, Site
from ...api.result import ExportResult
from ...formatting import megabytes
from ...passes.moe_coverage import FEW_TOKENS
from ...plan.embedding_plan import EmbeddingPlan
from ...plan.linear_plan import LinearPlan
from ...plan.model_plan import described_embedding
from ...report.facts import overrides_yaml
from ...runtime.benchmark import BenchResult
from ...runtime.doctor import Check
from ...runtime.optimized import OptimizedInfo
from ...sampling_study.result import Study, StudyRow
from ...validation import Report, summary_rows, worst_linears
from ...validation.formatting import number
from ..console import print_table


def export_summary(result: ExportResult) -> dict[str, Any]:
    """What an export did, in plain types."""
    return {
        "folder": str(result.folder),
        "target": result.manifest.target,
        "bytes": dict(result.manifest.bytes),
        "calibration": result.calibration,
        "reference": asdict(result.reference),
        "seconds": dict(result.seconds),
        "quantized_linears": len(result.manifest.linears),
        "quantized_convolutions": len(result.manifest.convolutions),
        "embeddings": [described_embedding(e) for e in result.embeddings],
        "fast_linears": sum(linear.fast is True for linear in result.manifest.linears),
        "exceptions": [
            {"linear": p.name, "scheme": p.scheme.name if p.scheme else "float", "reason": p.reason}
            for p in [*result.plan, *result.convolutions]
            if p.reason
        ],
        "dense_experts": [{"experts": name, "reason": why} for name, why in result.dense.items()],
        "rarely_chosen": [{"linear": name, "tokens": what} for name, what in result.rarely_chosen.items()],
        "kept": result.kept,
        "unseen_features": [{"linear": n, "share": round(share, 4)} for n, share in result.unseen.items()],
        "warnings": list(result.warnings),
        "parts": {name: export_summary(part) for name, part in result.parts.items()},
    }


def auto_summary(found: AutoResult) -> dict[str, Any]:
    """The same, with the choice and what it led to under "auto"."""
    return export_summary(found.export) | {"auto": found.as_dict()}


def print_auto(found: AutoResult) -> None:
    """The export, and how close to the float model the chosen schemes are."""
    print_export(found.export)
    chosen, scores = found.as_dict(), found.logits
    counts = ", ".join(f"{n} {scheme}" for scheme, n in sorted(chosen["schemes"].items(), key=lambda s: -s[1]))
    print(f"  chosen: {counts}, in {found.exports} exports" if found.exports > 1 else f"  chosen: {counts}")
    print(
        f"  KL {number(scores.kl_mean)} a token (foretold {number(found.predicted_kl)}), perplexity"
        f" {number(scores.float_perplexity)} -> {number(scores.perplexity)}, on {found.text}"
    )


def print_kept(kept: list[str]) -> None:
    """Files that a replaced folder held."""
    if kept:
        print(f"  kept, as no export wrote them: {', '.join(kept)}")


def print_export(result: ExportResult) -> None:
    """Where it is, how large, what was not done as asked, and what to do next; of two parts one after the other."""
    for part in result.parts.values():
        print_export(part)
    if result.parts:
        print_kept(result.kept)
        _print_next(result, " --text FILE", generates=True)
        return
    sizes, quantized = result.manifest.bytes, [p for p in result.plan if p.scheme is not None]
    shared = {e.linear for e in result.embeddings}
    weights = 4 * sum(p.shape[0] * p.shape[1] for p in quantized if p.name not in shared)
    print(f"{result.folder}: {megabytes(sizes['model'])} for {result.manifest.target}")
    small = sum(entry.bytes for entry in result.manifest.linears)
    print(
        f"  {len(quantized)} of {len(result.plan)} linears quantized, {megabytes(weights)} in float32"
        f" -> {megabytes(small)}"
    )
    if result.convolutions:
        print(f"  {len(result.manifest.convolutions)} of {len(result.convolutions)} convolutions quantized")
    print(f"  {_parts(sizes)}")
    for embedding in result.embeddings:
        print(f"  {_embedding(embedding)}")
    print(f"  reference: {result.reference.sentence()}")
    print(f"  calibration: {result.calibration}")
    print(f"  seconds: {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in result.seconds.items())}")
    _print_exceptions([*result.plan, *result.convolutions])
    for reason, count in Counter(result.dense.values()).most_common():
        print(f"  {count} mixtures of experts compute every expert for every token: {reason}")
    if rare := result.rarely_chosen:
        print(f"  fewer than {FEW_TOKENS} calibration tokens chose the experts of {len(rare)} linears: see report.json")
    for sentence in result.warnings:
        print(f"  warning: {sentence}")
    print_kept(result.kept)
    _print_fast([linear.slow for linear in result.manifest.linears if linear.fast is not None], "  ")
    if result.manifest.kind == "encoder":
        _print_next(result, " --text FILE", generates=False)
    if result.manifest.kind == "decoder":
        _print_next(result, "", generates=True)


def _print_next(result: ExportResult, text: str, *, generates: bool) -> None:
    """The commands that go on from here."""
    more = f"; qexport generate {result.folder} --prompt TEXT" if generates else ""
    print(f"Next: qexport validate {result.folder} --reference MODEL{text}{more}")


def _parts(sizes: Mapping[str, int]) -> str:
    head = f", output projection {megabytes(sizes['lm_head'])}" if sizes["lm_head"] else ""
    table = f"embedding {megabytes(sizes['embedding'])}{head}, " if sizes["embedding"] or head else ""
    return f"{table}the rest takes {megabytes(sizes['rest'])}"


def _embedding(plan: EmbeddingPlan) -> str:
    """`model.embed_tokens: w4a16_g32, which lm_head reads too`"""
    scheme = plan.scheme.name if plan.scheme else "float"
    return ", ".join(filter(None, [
        f"{plan.name}: {scheme}", plan.linear and f"which {plan.linear} reads too", plan.reason,
    ]))  # fmt: skip


def _print_exceptions(plan: Sequence[LinearPlan]) -> None:
    for first, name, count in compressed(p for p in plan if p.reason):
        print(f"  {name} ({count}): {first.scheme.name if first.scheme else 'float'}, {first.reason}")


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
    for sentence in found.warnings:
        print(f"warning: {sentence}\n")
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
        print(f"\nEmbedding of {tokens} x {features}, {embedding.bytes:,} bytes: {_embedding(embedding)}")
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
    _print_fast(list(found.slow.values()))
    print(
        f"{megabytes(sizes['float'])} in the float type of this target -> {megabytes(sizes['total'])}: "
        f"linears {megabytes(sizes['quantized'])}, {_parts(sizes)}"
    )
    if found.attention:
        print(f"Attention is {found.attention}")
    print("The export calibrates" if found.calibrates else "The export needs no calibration data")
    if found.calibration:
        print(f"Calibration here: {found.calibration}")
    if any(s.range is not None for s in found.sites):
        print("Ranges are the float model's; an export sees every block behind quantized ones, and may find others")


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


def _print_fast(slow: Sequence[str], indent: str = "") -> None:
    """How many linears have the shape for the fastest kernel, and why others have not.

    Args:
        slow: for every linear that becomes MatMulNBits on CUDA the reason; empty where it has the shape.
    """
    if slow:
        reasons = Counter(reason for reason in slow if reason)
        why = "".join(f"; {count}: {reason}" for reason, count in reasons.most_common())
        print(
            f"{indent}fpA_intB, the fastest kernel of MatMulNBits, takes {slow.count('')} of {len(slow)} linears{why}"
        )


def _print_ranges(sites: Sequence[tuple[Site, str, list[Site]]]) -> None:
    """What values reach, and what a policy makes of that."""
    seen = [(s, name, [g.range for g in group]) for s, name, group in sites if s.range is not None]
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


def print_validation(report: Report) -> None:
    """The measures and the verdict; of two parts what is to be said of both together."""
    print_table(["measure", "value", "what it means"], [list(row) for row in summary_rows(report)])
    if worst := worst_linears(report):
        print("\nThe linears with the largest errors of their own:\n")
        columns = ["linear", "SQNR", "bits a weight", "kernel", "of a prompt's time"]
        print_table(columns, [list(row) for row in worst])
    print()
    for sentence in report.verdict:
        print(f"- {sentence}")
    if suggested := overrides_yaml(report):
        print(f"\nWhat would buy back the most KL for a byte, for the recipe:\n\n{suggested}", end="")


def print_bench(result: BenchResult) -> None:
    """Medians of one folder, or of two side by side with their ratio, in numbers and in words."""
    measured = [m for m in (result.first, result.second) if m is not None]
    rows = [
        [f"prompt of {n} tokens, tokens/s", *(f"{m.prefill[n]:,.1f}" for m in measured), _ratio(result, f"prefill:{n}")]
        for n in result.first.prefill
    ]
    rows += [
        [
            f"decoding after {n} tokens, tokens/s",
            *(f"{m.decode[n]:,.1f}" for m in measured),
            _ratio(result, f"decode:{n}"),
        ]
        for n in result.first.decode
    ]
    rows += [
        ["load, seconds", *(f"{m.load_seconds:.2f}" for m in measured), _ratio(result, "load_seconds")],
        ["memory", *(megabytes(m.memory_bytes) for m in measured), _ratio(result, "memory_bytes")],
        ["file", *(megabytes(m.model_bytes) for m in measured), _ratio(result, "model_bytes")],
    ]
    columns = ["batch 1", *(m.folder for m in measured), "first/second"]
    if result.second is None:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows)
    print(f"{result.threads} threads, medians")
    for note in result.notes:
        print(note)
    if result.second is not None:
        print(in_words(result))


def in_words(result: BenchResult) -> str:
    """One sentence on how the first folder compares with the second."""

    def rates(kind: str) -> list[str]:
        found = {key.split(":")[1]: ratio for key, ratio in result.ratios.items() if key.startswith(f"{kind}:")}
        return [f"{ratio:.2f} times as fast with {n} tokens" for n, ratio in found.items()]

    parts = [f"reads a prompt {', '.join(rates('prefill'))}"] if rates("prefill") else []
    parts += [f"decodes {', '.join(rates('decode'))} in the cache"] if rates("decode") else []
    load, memory, size = (result.ratios[name] for name in ("load_seconds", "memory_bytes", "model_bytes"))
    parts.append(f"loads in {load:.2f} of the time, takes {memory:.2f} of the memory and {size:.2f} of the disk")
    return f"{result.first.folder} against {result.second.folder}: {'; '.join(parts)}"


def _ratio(result: BenchResult, name: str) -> str:
    return f"{result.ratios[name]:.2f}" if name in result.ratios else ""


def print_study(result: Study) -> None:
    """Every format under every setting, what the formats are, and the conclusions."""
    columns = [
        "format", "temperature", "top-k", "new tokens", "distance", "same start", "same tokens", "perplexity",
        "to float's", "repeated", "distinct-1", "distinct-2", "tokens/s",
    ]  # fmt: skip
    print_table(columns, [_study_row(row) for row in result.rows])
    print()
    print_table(
        ["format", "runs in", "model file", "tokens/s"],
        [[f.name, f.runtime, megabytes(f.model_bytes), _fixed(f.tokens_per_second, 1)] for f in result.formats],
    )
    several = len(result.prompts) > 1
    print(
        f"{len(result.prompts)} prompt{'s' if several else ''}, seeds {', '.join(map(str, result.seeds))}; means and "
        f"standard errors over {'prompts' if several else 'seeds'}; `qexport study --help` says what the columns are\n"
    )
    for sentence in result.conclusions:
        print(f"- {sentence}")


def _study_row(row: StudyRow) -> list[Any]:
    def cell(name: str, digits: int) -> str:
        value, error = getattr(row, name), getattr(row, f"{name}_error")
        return _fixed(value, digits) if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"

    measures = {
        "distance": 3, "prefix_share": 2, "token_agreement": 2, "perplexity": 2, "perplexity_ratio": 2, "repetition": 3,
        "distinct_1": 2, "distinct_2": 2,
    }  # fmt: skip
    setting = [f"{row.temperature:g}", str(row.top_k) if row.top_k else "off" if row.temperature else "any"]
    return [
        row.format, *setting, row.max_new_tokens, *(cell(name, digits) for name, digits in measures.items()),
        _fixed(row.tokens_per_second, 1),
    ]  # fmt: skip


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_optimized(result: OptimizedInfo) -> None:
    """What it costs, what it brings, and how long it is good for."""
    before, after = result.load_seconds["before"], result.load_seconds["after"]
    shared = f" and shares {megabytes(result.shared_bytes)} with it" if result.shared_bytes else ""
    print(f"{result.folder}: {megabytes(result.bytes)} beside a model of {megabytes(result.model_bytes)}{shared}")
    print(f"  load: {after:.3f} s instead of {before:.3f} s (medians of {len(result.samples['after'])}, in turns)")
    print("  used on this processor, with this version of ONNX Runtime, until the model changes; delete it to undo")


def print_checks(checks: Sequence[Check]) -> None:
    """One line for each thing looked at, and the remedy below where there is one."""
    for check in checks:
        mark = "ok" if check.ok else "no" if check.optional else "BAD"
        print(f"{mark:<4}{check.name:<26}{check.detail}")
        if check.remedy:
            print(f"{'':<30}{check.remedy}")
