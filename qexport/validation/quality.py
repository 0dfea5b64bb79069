"""How good an export is, by limits that are stated here and nowhere else.

Whether a file runs as planned is another question, see `verdict`: a file without a fault may be a bad model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .formatting import share, with_error
from .report import GradedMeasure, Logits, Quality, Report, ValueComparison


@dataclass(frozen=True)
class Grade:
    """A grade and what it takes; a value has the best grade whose limit it keeps.

    Attributes:
        kl: largest mean KL, in nats a token.
        perplexity: largest perplexity over the float model's.
        top1: least share of tokens with the same likeliest one.
        sqnr_db: least SQNR of an output, for models without text.
        like: what is as close.
    """

    name: str
    kl: float
    perplexity: float
    top1: float
    sqnr_db: float
    like: str


# Anchors: `samples/accuracy_table.py` on SmolLM2-135M, which says with which arguments; samples/results/grades.md has
# what it printed. Relative perplexity, KL and top-1 of
#   float16 in PyTorch 1.000, 0.000016, 99.6 %: lossless leaves room for models that are worse at it, and for bfloat16;
#   w8a16 1.007, 0.0036, 96.6 % and w8a8_dyn 1.015, 0.012, 94.3 %: excellent ends just above them;
#   w4a16_g32 by GPTQ on text of the same kind 1.06, 0.081, 84.6 %: good ends at twice that;
#   nf4 (bitsandbytes) 1.31, 0.28, 73 % and HQQ 1.38, 0.36, 69 %: fair ends just above them;
#   rounding to nearest in groups of 32, ONNX Runtime's own quantizer, 1.41, 0.42, 68 %: poor.
# Of outputs: at 15.8 dB an image classifier in 8 bits still agrees with the float one on 84 % of the images, at 4.3 on
# 56 %: from a tenth of the energy on, errors decide.
GRADES = (
    Grade("lossless", 0.001, 1.005, 0.98, 50.0, "no further from float32 than other float types are"),
    Grade("excellent", 0.02, 1.02, 0.92, 30.0, "as 8-bit weights are"),
    Grade("good", 0.15, 1.15, 0.80, 20.0, "as carefully calibrated 4-bit weights are"),
    Grade("fair", 0.38, 1.38, 0.69, 10.0, "as the better of the common 4-bit tools leave a small model"),
    Grade("poor", math.inf, math.inf, 0.0, -math.inf, "as rounding to 4 bits leaves a small model, or worse"),
)
BROKEN = "broken"
_TONES = {"lossless": "good", "excellent": "good", "good": "good", "fair": "middle"}  # of others it is bad
KL, PERPLEXITY, TOP1 = "mean KL", "relative perplexity", "same likeliest token"


def graded(report: Report) -> Quality | None:
    """The grade of a report, the worst that a measure gives; None where there is nothing to grade by."""
    found = [*_of_logits(report.logits)] if report.logits is not None else [_of_output(row) for row in report.outputs]
    if not found:
        return None
    worst = max(found, key=lambda measure: rank_of(measure.grade))
    tone = _TONES.get(worst.grade, "bad")
    return Quality.model_validate(
        dict(grade=worst.grade, tone=tone, sentence=_sentence(worst, found), measures=tuple(found))
    )


def _of_logits(scores: Logits) -> Iterator[GradedMeasure]:
    yield _measure(KL, scores.kl_mean, scores.kl_error)
    yield _measure(PERPLEXITY, scores.relative_perplexity, scores.relative_perplexity_error)
    yield _measure(TOP1, None if scores.nonfinite_tokens else scores.top1_agreement, scores.top1_error)


def _of_output(row: ValueComparison) -> GradedMeasure:
    # JSON has no infinity: equal values have no SQNR, and neither has an error beside no signal.
    value = math.inf if row.max_abs_error == 0 else row.sqnr_db
    if value is None and row.max_abs_error is not None:
        value = -math.inf
    return _measure(f"output {row.name}", value)


def _measure(name: str, value: float | None, error: float | None = None) -> GradedMeasure:
    """A measure with the best grade whose limit it keeps."""
    if value is None or math.isnan(value):
        return GradedMeasure(measure=name, value=None, grade=BROKEN)
    field, sign = _field(name)
    grade = next(grade for grade in GRADES if sign * value <= sign * getattr(grade, field))
    limit = None if grade is GRADES[-1] else getattr(grade, field)
    return GradedMeasure(measure=name, value=value, error=error, grade=grade.name, limit=limit)


def _field(measure: str) -> tuple[str, int]:
    """The field of `Grade` that has the limits of a measure, and 1 where they are upper ones, else -1."""
    return {KL: ("kl", 1), PERPLEXITY: ("perplexity", 1), TOP1: ("top1", -1)}.get(measure, ("sqnr_db", -1))


def limit_of(grade: str) -> float:
    """The largest mean KL that a grade allows."""
    return GRADES[rank_of(grade)].kl


def rank_of(grade: str) -> int:
    """0 for the best grade."""
    return next((index for index, known in enumerate(GRADES) if known.name == grade), len(GRADES))


def _sentence(worst: GradedMeasure, found: list[GradedMeasure]) -> str:
    if worst.grade == BROKEN:
        return f"quality is {BROKEN}: the {worst.measure} is not finite"
    grade = GRADES[rank_of(worst.grade)]
    alike = [measure for measure in found if measure.grade == worst.grade]
    said = " and ".join(worded(measure) for measure in alike[:3]) + (" and others" if len(alike) > 3 else "")
    # What methods reach was measured on language models.
    like = f", {grade.like}" if worst.measure in (KL, PERPLEXITY, TOP1) else ""
    return f"quality is {grade.name}{like}: {said}{_close(worst)}"


def worded(measure: GradedMeasure) -> str:
    """`mean KL 0.0812 ± 0.0031 (good goes to 0.12)`."""
    text = f"{measure.measure} {_value(measure, measure.value, measure.error)}"
    if measure.grade == BROKEN:
        return text
    grade = GRADES[min(rank_of(measure.grade), len(GRADES) - 2)]  # the last one has no limit, the one before ends there
    return f"{text} ({grade.name} goes to {_value(measure, getattr(grade, _field(measure.measure)[0]))})"


def _value(measure: GradedMeasure, value: float | None, error: float | None = None) -> str:
    if measure.measure == TOP1:
        return share(value, error)
    if measure.measure in (KL, PERPLEXITY):
        return with_error(value, error)
    if value is None:  # an infinity
        return "equal" if measure.grade == GRADES[0].name else "no signal"
    return f"{value:.1f} dB"


def _close(measure: GradedMeasure) -> str:
    """Says so where a standard error more or less would be another grade."""
    if measure.value is None or not measure.error:
        return ""
    ends = (measure.value - measure.error, measure.value + measure.error)
    grades = {_measure(measure.measure, end).grade for end in ends} - {measure.grade}
    return f"; within one standard error it is {' or '.join(sorted(grades, key=rank_of))}" if grades else ""
