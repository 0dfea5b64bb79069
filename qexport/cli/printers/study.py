"""What `qexport study` prints."""

from typing import Any

from ...formatting import megabytes
from ...sampling_study.result import Study, StudyRow
from ..console import print_table


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
