"""Results of lm-evaluation-harness that lie in an export: scores on tasks, beside which KL is only a forecast."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILES = "**/results*.json"  # below an --output_path, with the name of the model and a date
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class TaskScore:
    """A score.

    Attributes:
        task: as lm-eval calls it; metric: the same, with its filter where that is not "none".
        value, error: and its standard error, where lm-eval knows one.
        higher_is_better: None where lm-eval does not say.
        shots: examples in front of each question; None where it does not say.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool | None = None
    shots: int | None = None


def task_scores(folder: Path) -> tuple[TaskScore, ...]:
    """The scores in an export's folder by task and metric, the newest where a task was run twice; none without any.

    Files that hold no such results are passed over.
    """
    paths = [path for path in folder.glob(_FILES) if path.is_file() and path.stat().st_size <= _MOST_BYTES]
    found: dict[tuple[str, str], TaskScore] = {}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found |= {(score.task, score.metric): score for score in _scores(whole)}
    return tuple(found[key] for key in sorted(found))


def _scores(whole: Any) -> Iterator[TaskScore]:
    results = whole.get("results") if isinstance(whole, dict) else None
    for task, measured in results.items() if isinstance(results, dict) else ():
        for key, value in measured.items() if isinstance(measured, dict) else ():
            metric, comma, kind = str(key).partition(",")
            if not comma or metric.endswith("_stderr") or not _number(value):
                continue
            error = measured.get(f"{metric}_stderr,{kind}")
            higher = _of(whole, "higher_is_better", task)
            better = higher.get(metric) if isinstance(higher, dict) else None
            shots = _of(whole, "n-shot", task)
            yield TaskScore(
                task=str(task), metric=metric if kind == "none" else f"{metric}, {kind}", value=float(value),
                error=float(error) if _number(error) else None,
                higher_is_better=better if isinstance(better, bool) else None,
                shots=shots if isinstance(shots, int) else None,
            )  # fmt: skip


def _of(whole: dict[str, Any], key: str, task: str) -> Any:
    by_task = whole.get(key)
    return by_task.get(task) if isinstance(by_task, dict) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
