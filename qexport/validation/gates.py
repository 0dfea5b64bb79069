"""Limits that a validation is asked to keep, for a program to go by."""

from dataclasses import dataclass

from ..errors import InputError
from .formatting import number, share, with_error
from .report import Gate, Logits


@dataclass(frozen=True)
class Gates:
    """What an export has to keep; None asks nothing.

    Attributes:
        max_kl: largest mean KL, in nats a token.
        max_ppl_rise: largest relative rise of perplexity, 0.05 for 5 %.
        min_top1: least share of tokens with the same likeliest one, 0 to 1.

    Raises:
        InputError: a limit that nothing or everything keeps.
    """

    max_kl: float | None = None
    max_ppl_rise: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_kl", "max_ppl_rise"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{value:g} is not a limit", place=name, remedy="Give a number from 0 up")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise InputError(
                f"{self.min_top1:g} is not a share of tokens", place="min_top1", remedy="Give a number from 0 to 1"
            )

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return any(limit is not None for limit in (self.max_kl, self.max_ppl_rise, self.min_top1))

    def of(self, scores: Logits) -> tuple[Gate, ...]:
        """Each limit beside what was measured."""
        found = []
        if (most := self.max_kl) is not None:
            kl = scores.kl_mean
            passed = kl is not None and kl <= most
            text = f"mean KL is {with_error(kl, scores.kl_error)}"
            found.append(_gate("--max-kl", most, kl, scores.kl_error, passed, text, number(most)))
        if (most := self.max_ppl_rise) is not None:
            times, error = scores.relative_perplexity, scores.relative_perplexity_error
            rise = None if times is None else times - 1
            passed = rise is not None and rise <= most
            text = f"perplexity is {with_error(times, error)} times the float model's"
            found.append(_gate("--max-ppl-rise", most, rise, error, passed, text, f"{1 + most:.6g} times"))
        if (least := self.min_top1) is not None:
            same = None if scores.nonfinite_tokens else scores.top1_agreement
            passed = same is not None and same >= least
            text = f"the likeliest token is the same for {share(same, scores.top1_error)}"
            found.append(_gate("--min-top1", least, same, scores.top1_error, passed, text, f"{100 * least:.4g} %"))
        return tuple(found)


def _gate(
    option: str, limit: float, value: float | None, error: float | None, passed: bool, text: str, allowed: str
) -> Gate:
    which = "at least" if option == "--min-top1" else "at most"
    return Gate(
        option=option, limit=limit, value=value, error=error, passed=passed,
        sentence=f"{option} {'kept' if passed else 'missed'}: {text}, and {which} {allowed} is allowed",
    )  # fmt: skip
