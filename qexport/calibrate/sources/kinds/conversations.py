"""A .jsonl file of conversations, one in a line, {"messages": [{"role": ..., "content": ...}, ...]}.

The model's own chat template writes them. They are taken from all over the file, one sequence each or packed; a line is
parsed when it is taken.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch

from ....errors import InputError
from ..documents import rows_of
from ..registry import Model, Source, source
from ..samples import Samples, spread
from .text_file import opened


@source
class Conversations(Source):
    form = "a .jsonl file of conversations"

    @classmethod
    def takes(cls, name: str) -> bool:
        return name.lower().endswith(".jsonl") and not name.startswith("datasets:")

    def check(self) -> None:
        with opened(self, "file of conversations") as file:
            if (first := next((line for line in file if line.strip()), None)) is not None:
                self._turns(first, "the first line")

    def samples(self, model: Model) -> Samples:
        return rows_of(self._documents(), self.spec, model.tokenizer, self.path.name)

    def _documents(self) -> Iterator[tuple[str, Any]]:
        """Of each line where it is and its messages: packed ones in a random order, as it is not known how many there
        will be."""
        with opened(self, "file of conversations") as file:
            begins, at = [], 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    begins.append((number, at))
                at += len(line)
            if not begins:
                raise InputError("it holds no conversations", place=str(self.path))
            spec = self.spec
            chosen = spread(len(begins), min(spec.samples, len(begins)), spec.seed)
            if spec.packed:
                chosen = torch.randperm(len(begins), generator=torch.Generator().manual_seed(spec.seed))
            for number, begin in (begins[index] for index in chosen.tolist()):
                file.seek(begin)
                yield f"{self.path.name}, line {number}", self._turns(file.readline(), f"line {number}")

    def _turns(self, line: bytes, where: str) -> Any:
        remedy = 'A line is {"messages": [...]}; of other columns name one: datasets:FILE:train:COLUMN'
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON ({error})", place=str(self.path), remedy=remedy) from None
        if not isinstance(row, dict) or "messages" not in row:
            raise InputError(f"{where} has no messages", place=str(self.path), remedy=remedy)
        return row["messages"]
