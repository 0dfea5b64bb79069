"""Validated exports for tests of what shows them: folders with a report and no model."""

import json
from pathlib import Path

from qexport.artifact.manifest import LinearEntry, Manifest
from qexport.artifact.manifest import save as save_manifest
from qexport.report import read_validated
from qexport.report.exported import Exported
from qexport.sampling_study.result import ComparedModel, Study, StudyRow
from qexport.validation.report import (
    Greedy,
    InputRange,
    LayerComparison,
    Logits,
    MarginBin,
    Placement,
    Reference,
    Report,
    Sensitivity,
    SuggestedOverride,
    ValueComparison,
)
from qexport.validation.verdict import with_verdict

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def logits(**changes) -> Logits:
    fields = dict(
        windows=2, window=33, tokens=64, kl_mean=0.1, kl_median=0.08, kl_p99=0.9, top1_agreement=0.75,
        float_perplexity=10.0, perplexity=11.0,
    )  # fmt: skip
    return Logits(**fields | changes)


def plain_report(layers: int = 3, **changes) -> Report:
    """A report as the oldest version wrote it: no optional field has a value."""
    linears = [
        ValueComparison(
            name=f"model.layers.{i}.{kind}", block=f"model.layers.{i}", scheme="w4a16_g32", sqnr_db=30.0 - i,
            own_sqnr_db=40.0 - i - 3 * k, cosine=0.999, max_abs_error=0.5,
        )
        for i in range(layers)
        for k, kind in enumerate(KINDS)
    ]  # fmt: skip
    blocks = [
        ValueComparison(
            name=f"model.layers.{i}", block=f"model.layers.{i}", sqnr_db=25.0 - i, own_sqnr_db=33.0, max_abs_error=1.0
        )
        for i in range(layers)
    ]
    fields = dict(
        reference="some/model", text="the first 2 windows of 33 tokens of text.txt",
        layers=LayerComparison(tokens=32, linears=tuple(linears), blocks=tuple(blocks), sessions=1), logits=logits(),
        placement=Placement(
            provider="CPUExecutionProvider", nodes_per_provider={"CPUExecutionProvider": 40},
            op_counts={"MatMulNBits": len(linears)}, kernels={"MatMulNBits": len(linears)},
        ),
    )  # fmt: skip
    return with_verdict(Report(**fields | changes))


MARGINS = (
    MarginBin(least=0.0, most=0.02, tokens=12, differ=0.5), MarginBin(least=0.7, most=1.0, tokens=52, differ=0.01),
)  # fmt: skip


def full_report(layers: int = 3) -> Report:
    """A report in which everything optional has a value."""
    report = plain_report(layers)
    linears = tuple(
        row.model_copy(update=dict(
            bytes=1000 * (i + 1), bits=4.5, kernel="MatMulNBits", provider="CPUExecutionProvider", time_share=0.01 * i,
            branch_gain_db=1.5, kl_cost=0.001 * (i + 1), rescaled=i % 2 == 0,
        ))
        for i, row in enumerate(report.layers.linears)
    )  # fmt: skip
    ranges = tuple(
        InputRange(
            block=f"model.layers.{i}", linears=(f"model.layers.{i}.{kind}",), float_absmax=50.0 + i, absmax=5.0 + i,
            float_spread=20.0, spread=2.0, clipped=0.001 * i,
        )
        for i in range(layers)
        for kind in KINDS[:2]
    )  # fmt: skip
    attentions = (ValueComparison(name="model.layers.0.self_attn", sqnr_db=30.0, own_sqnr_db=60.0, max_abs_error=0.1),)
    worst = linears[-1].name
    return report.model_copy(update=dict(
        layers=report.layers.model_copy(update=dict(linears=linears, ranges=ranges, attentions=attentions)),
        logits=logits(
            top5_agreement=0.9, kl_by_position=(0.1, 0.2, None, 0.4), by_margin=MARGINS, margin_separates=0.9
        ),
        references=(Reference(name="float16 in PyTorch", logits=logits(kl_mean=1e-5)),),
        greedy=Greedy(prompts=2, prompt_tokens=8, new_tokens=16, agreed=(16, 3)),
        sensitivity=Sensitivity(
            tokens=64, kl_mean=0.1, kl_foretold=0.078,
            measured={worst: 0.02, "model.layers.0.mlp.up_proj": -0.001, "prologue": 0.004},
            overrides=(
                SuggestedOverride(
                    match=worst, scheme="w8a16_g32", instead_of="w4a16_g32", more_bytes=5000, kl_gain=0.02
                ),
            ),
        ),
        settings=dict(reference="some/model", text="my text.txt", windows=2, window=33, threads=None, provider=None),
        versions={"qexport": "9.9", "onnxruntime": "1.31.1", "torch": "2.13.0"},
    ))  # fmt: skip


def a_manifest(report: Report, **changes) -> Manifest:
    linears = tuple(
        LinearEntry(
            name=row.name, block=row.block, scheme=row.scheme, output=row.name, node=row.name, kernel="MatMulNBits",
            shape=(8, 8), bytes=100,
        )
        for row in report.layers.linears
    )  # fmt: skip
    fields = dict(
        qexport="9.9", target="cpu", kind="decoder", linears=linears, session={"some.option": "4"},
        numerics={"weight_only": "inputs are rounded"}, bytes={"model": 3_000_000, "quantized_linears": 1_000_000},
    )  # fmt: skip
    return Manifest(**fields | changes)


def write_validated(
    folder: Path, report: Report, *, export: dict | None = None, recipe: str = "name: mine\nscheme: w4a16_g32\n",
    **manifest,
) -> Exported:  # fmt: skip
    """Write what rendering reads and read it again."""
    folder.mkdir(parents=True, exist_ok=True)
    save_manifest(a_manifest(report, **manifest), folder)
    (folder / "model.onnx").touch()
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    whole = {"export": export or {}, "validation": report.as_dict()}
    (folder / "report.json").write_text(json.dumps(whole), encoding="utf-8")
    return read_validated(folder)


def a_study(names=("mine", "other"), temperatures=(0.0, 1.0), top_ks=(0,), lengths=(8,), **changes) -> Study:
    """A study in which the n-th export (float is 0) has distance 0.1 n + 0.01 temperature + 0.001 top_k; no file."""
    measures = [*StudyRow.model_fields][5:]  # behind the setting
    settings = [(t, k) for t in temperatures for k in (top_ks if t else (0,))]
    rows = [
        StudyRow(
            format=name, temperature=t, top_k=k, max_new_tokens=length, texts=3,
            **dict.fromkeys(measures, 0.5)
            | dict(distance=0.1 * n + 0.01 * t + 0.001 * k, distance_error=0.02, perplexity_ratio=1.0 + n),
        )
        for n, name in enumerate(("float", *names))
        for length in lengths
        for t, k in settings
    ]  # fmt: skip
    fields = dict(
        reference="/home/somebody/models/some-model", prompts=("a", "b", "c"), seeds=(0, 1), temperatures=temperatures,
        top_ks=top_ks, max_new_tokens=lengths, rows=tuple(rows), choices=(),
        formats=tuple(
            ComparedModel(name=name, folder="" if name == "float" else name, runtime="", model_bytes=0)
            for name in ("float", *names)
        ),
        conclusions=tuple(f"{name}, top-k off: distance" for name in names),
    )  # fmt: skip
    return Study(**fields | changes)
