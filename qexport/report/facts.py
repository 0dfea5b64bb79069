"""What a report says in single numbers and lines: key figures, yardsticks, overrides, commands."""

import shlex
from dataclasses import dataclass

import yaml

from ..artifact.manifest import RECIPE_FILE, is_part
from ..formatting import megabytes
from ..recipe.sections import only
from ..validation.formatting import decibels, own, share, with_error, worst_first
from ..validation.quality import GRADES, graded, worded
from ..validation.report import Logits, Quality, Report
from .exported import Exported
from .speed import Speed


@dataclass(frozen=True)
class Key:
    """A key figure: what, how much, and a few words; was: the float model's, in front of an arrow."""

    label: str
    value: str
    note: str = ""
    was: str = ""


def key_figures(exported: Exported) -> list[Key]:
    """The few numbers people ask for first."""
    report, found = exported.validation, list[Key]()
    if (scores := report.logits) is not None:
        found += _of_logits(scores)
    found += [Key(f"Output {row.name}", decibels(row.sqnr_db, row), "SQNR over all inputs") for row in report.outputs]
    if report.layers.linears:
        worst = worst_first(report.layers.linears)[0]
        found.append(Key("Lowest own SQNR of a linear", decibels(own(worst), worst), worst.name))
    if report.layers.blocks:
        last = report.layers.blocks[-1]
        found.append(Key("SQNR after all blocks", decibels(last.sqnr_db, last), "with all errors so far"))
    sizes = exported.manifest.bytes
    if "model" in sizes:
        parts = [f"{name} {megabytes(sizes[key])}" for key, name in _PARTS if sizes.get(key)]
        found.append(Key("File", megabytes(sizes["model"]), ", ".join(parts)))
    return found if exported.speed is None else [*found, *_of_speed(exported.speed)]


def _of_speed(speed: Speed) -> list[Key]:
    """The first rate of each kind, and where it was measured."""
    threads = "every physical core" if speed.threads is None else f"{speed.threads} threads"
    kinds = (("Decoding", speed.decode, "in the cache"), ("Reading a prompt", speed.prefill, "each"))
    return [
        Key(name, f"{rates[n]:,.0f} tokens/s", f"{n} tokens {what}; {threads} of {speed.machine}")
        for name, rates, what in kinds
        if (n := min(rates, default=None)) is not None
    ]


_PARTS = (("quantized_linears", "linears"), ("embedding", "embedding"), ("lm_head", "output projection"))


def _of_logits(scores: Logits) -> list[Key]:
    five = "" if scores.top5_agreement is None else f"{scores.top5_agreement:.1%} of the likeliest five"
    return [
        Key("KL from the float model", with_error(scores.kl_mean, scores.kl_error),
            f"mean a token; median {digits(scores.kl_median)}, 99 %\u00a0{digits(scores.kl_p99)}"),
        Key("Relative perplexity", with_error(scores.relative_perplexity, scores.relative_perplexity_error),
            f"{digits(scores.float_perplexity)} → {digits(scores.perplexity)} over {scores.tokens:,} tokens"),
        Key("Same likeliest token", share(scores.top1_agreement, scores.top1_error), five),
    ]  # fmt: skip


def quality(report: Report) -> Quality | None:
    """The grade of a report; one from before there were grades gets it now."""
    return report.quality or graded(report)


def grades(found: Quality) -> list[tuple[str, str]]:
    """(measure beside its limit, grade) of everything that was graded."""
    return [(worded(measure), measure.grade) for measure in found.measures]


def scale(report: Report) -> list[tuple[str, ...]]:
    """The limits of every grade but the last: (grade, limit of each measure ..., what is as close)."""
    if report.logits is None:
        return [(grade.name, f"{grade.sqnr_db:.0f} dB") for grade in GRADES[:-1]]
    return [
        (grade.name, f"{grade.kl:g}", f"{grade.perplexity:g}", f"{grade.top1:.0%}", grade.like) for grade in GRADES[:-1]
    ]


def digits(value: float | None) -> str:
    """Four digits, for people; a dash where there is no number."""
    return "–" if value is None else f"{value:.4g}"


def yardsticks(report: Report) -> list[tuple[str, ...]]:
    """(form of the model, mean KL, 99 % KL, same likeliest token, perplexity), the export last; none without others."""
    if report.logits is None or not report.references:
        return []
    forms = [(r.name, r.logits) for r in report.references] + [("this export", report.logits)]
    return [
        (name, digits(s.kl_mean), digits(s.kl_p99), f"{s.top1_agreement:.2%}", digits(s.perplexity))
        for name, s in forms
    ]


def overrides_yaml(report: Report) -> str:
    """The suggested overrides for a recipe; empty where nothing was measured or nothing helps."""
    if report.sensitivity is None or not report.sensitivity.overrides:
        return ""
    found = [{"match": only(better.match), "scheme": better.scheme} for better in report.sensitivity.overrides]
    return yaml.safe_dump({"overrides": found}, sort_keys=False, allow_unicode=True)


def commands(exported: Exported) -> list[str]:
    """The command lines that make this export and this report again; none for a model that is no file."""
    manifest, report = exported.manifest, exported.report
    if manifest.kind == "module" or is_part(manifest) or report is None:
        return []
    model = str(report.settings.get("reference") or report.reference)
    make = ["qexport", "export", model, "--out", "out", "--recipe", RECIPE_FILE, "--target", manifest.target]
    make += ["--attention", "standard"] if manifest.settings.get("attention") == "standard" else []
    make += ["--logits", "last"] if manifest.settings.get("logits") == "last" else []
    check = ["qexport", "validate", report.foreign.file if report.foreign else "out", "--reference", model]
    for name, value in report.settings.items():
        if name != "reference" and value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            check += [option] if value is True else [option, str(value)]
    if report.foreign:  # which another tool made
        return [shlex.join(check)]
    return [shlex.join(make), shlex.join(check)] if report.settings else [shlex.join(make)]


def versions(exported: Exported) -> dict[str, str]:
    """Versions of what made and checked the export; qexport twice where they differ."""
    found, made = dict(exported.report.versions if exported.report else {}), exported.manifest.qexport
    if made and made != found.get("qexport"):
        found = {"qexport, for the export": made} | found
    return found
