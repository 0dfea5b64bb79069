"""Calibration text out of a data set, through Hugging Face's optional `datasets` package."""

import re
from pathlib import Path
from typing import Any

from ..errors import InputError

_FORM = "datasets:ID:SPLIT:COLUMN or datasets:ID:CONFIG:SPLIT:COLUMN"
_BETWEEN = "\n\n"
_BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}


def dataset_text(source: str, *, enough: int) -> str:
    """The rows of a column, in order, until there are `enough` characters; a blank line between two rows.

    Args:
        source: "datasets:ID:SPLIT:COLUMN", with CONFIG after the ID of a data set that has several. ID is a data set on
            the Hub or a local .json, .jsonl, .txt, .csv or .parquet file (whose split is "train", and the column of a
            .txt file "text"). A data set is streamed, so only the rows in use are downloaded, unless SPLIT is a slice
            such as train[1000:].

    Raises:
        InputError: another form, `datasets` not installed, no such data set, split or column, or rows without text.
    """
    name, config, split, column = _parts(source)
    try:
        import datasets
    except ImportError:
        raise InputError(
            "the datasets package is not installed", place=source, remedy="pip install 'qexport[datasets]'"
        ) from None
    path = Path(name).expanduser()
    arguments: dict[str, Any] = {"path": name, "name": config}
    if path.suffix.lower() in _BUILDERS:
        if not path.is_file():
            raise InputError("there is no such file", place=source)
        arguments = {"path": _BUILDERS[path.suffix.lower()], "data_files": str(path)}
    try:
        rows = datasets.load_dataset(**arguments, split=split, streaming="[" not in split)
        return _column(rows, column, source, enough)
    except InputError:
        raise
    except Exception as error:  # datasets passes on whatever its readers and the network raise
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the data set cannot be read: {problem}", place=source) from error


def _parts(source: str) -> tuple[str, str | None, str, str]:
    # A colon inside brackets belongs to a slice: train[:1000].
    parts = re.split(r":(?![^\[\]]*\])", source)[1:]
    if len(parts) not in (3, 4) or not all(parts):
        raise InputError("this does not name a data set's column", place=source, remedy=f"Write {_FORM}")
    return parts[0], parts[1] if len(parts) == 4 else None, parts[-2], parts[-1]


def _column(rows: Any, column: str, source: str, enough: int) -> str:
    texts, length = [], 0
    for row in rows:
        if column not in row:
            raise InputError(f"there is no column {column!r}", place=source, remedy=f"Columns are {', '.join(row)}")
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(f"column {column!r} holds {type(text).__name__}, not text", place=source)
        texts.append(text)
        length += len(text) + len(_BETWEEN)
        if length >= enough:
            break
    return _BETWEEN.join(texts)
