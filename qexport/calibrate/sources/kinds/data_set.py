"""A column of a data set, through Hugging Face's optional `datasets` package: "datasets:ID:SPLIT:COLUMN".

With CONFIG after the ID of a data set that has several. ID is a data set on the Hub or a local .json, .jsonl, .txt,
.csv or .parquet file (whose split is "train", and the column of a .txt file "text"). A data set is streamed, so that
only the rows in use are downloaded, unless SPLIT is a slice such as train[1000:]. A column holds texts, which are
joined, a blank line between two rows, and cut into windows; or conversations, which the model's chat template writes.
"""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ....errors import InputError
from ..documents import rows_of, spread_windows
from ..registry import Model, Source, source
from ..samples import Samples

_FORM = "datasets:ID:SPLIT:COLUMN or datasets:ID:CONFIG:SPLIT:COLUMN"
_BETWEEN = "\n\n"
_BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}


@source
class DataSet(Source):
    form = '"datasets:ID:SPLIT:COLUMN"'

    @classmethod
    def takes(cls, name: str) -> bool:
        return name.startswith("datasets:")

    def samples(self, model: Model) -> Samples:
        spec, source = self.spec, self.name
        rows = _rows(source)
        first = next(rows, None)
        if first is None or (isinstance(first, str) and not spec.packed):
            # Text enough for 16 characters a token: up to four times what is needed, to spread the windows over.
            text = _joined(first, rows, enough=16 * spec.samples * spec.sequence_length)
            return spread_windows(text, source, spec, model.tokenizer)
        places = ((f"{source}, row {number}", row) for number, row in enumerate(chain([first], rows), 1))
        return rows_of(places, spec, model.tokenizer, source)


def _rows(source: str) -> Iterator[Any]:
    """The texts or conversations of a column, in order; rows without one are left out.

    Raises:
        InputError: another form, `datasets` not installed, no such data set, split or column, or rows of other things.
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
    kind: type | None = None
    try:
        for row in datasets.load_dataset(**arguments, split=split, streaming="[" not in split):
            if column not in row:
                raise InputError(f"there is no column {column!r}", place=source, remedy=f"Columns are {', '.join(row)}")
            found = row[column]
            if found is None:
                continue
            kind = kind or type(found)
            if kind not in (str, list) or not isinstance(found, kind):
                raise InputError(
                    f"column {column!r} holds {type(found).__name__}, not text", place=source,
                    remedy="Name a column of texts, or of lists of messages",
                )  # fmt: skip
            yield found
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


def _joined(first: str | None, rows: Iterator[Any], *, enough: int) -> str:
    """Rows in order, until there are `enough` characters."""
    texts: list[str] = []
    length = 0
    for text in () if first is None else chain([first], rows):
        texts.append(text)
        length += len(text) + len(_BETWEEN)
        if length >= enough:
            break
    return _BETWEEN.join(texts)
