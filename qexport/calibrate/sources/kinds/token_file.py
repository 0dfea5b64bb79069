"""A file of token ids, of which only those are read that are taken: rows [n, S], or one long text [T].

.npy of any integers; .bin, little-endian int32 and nothing else; .safetensors with `input_ids` (and `attention_mask`),
or one tensor. Of rows spec.samples are taken, spread over the file, cut after spec.sequence_length tokens; a long text
is cut into windows of that many first.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ....errors import InputError, reading
from ..registry import Model, Source, forms, source
from ..samples import Samples, padded_left, spread
from ..text import MORE

_REMEDY = "Save token ids as integers [n, S] or [T]: .npy, .safetensors with input_ids, or .bin of int32"


@dataclass(frozen=True)
class _Table:
    """Ids in a file.

    Attributes:
        shape: of them.
        ids, mask: from where to where in the first dimension -> that part; no mask where there is no padding.
    """

    shape: tuple[int, ...]
    ids: Callable[[int, int], Tensor]
    mask: Callable[[int, int], Tensor] | None = None


@source
class TokenFile(Source):
    form = "a file of token ids (.npy, .bin, .safetensors)"
    tokenizes = False

    @classmethod
    def takes(cls, name: str) -> bool:
        return not name.startswith("datasets:") and Path(name).suffix.lower() in _READERS

    def check(self) -> None:
        with self._open():
            pass

    def samples(self, model: Model) -> Samples:
        spec, length = self.spec, self.spec.sequence_length
        if spec.packed:
            raise InputError("token ids cannot be packed again", place=str(self.path), remedy="Set packed: false")
        with self._open() as table:
            if len(table.shape) == 1:
                count, step, width = table.shape[0] // length, length, length
            else:
                count, step, width = table.shape[0], 1, min(table.shape[1], length)
            if not count:
                raise InputError(
                    f"its {table.shape[0]} tokens are fewer than one sample of {length}", place=str(self.path),
                    remedy=MORE,
                )  # fmt: skip
            places = [step * at for at in spread(count, min(spec.samples, count), spec.seed).tolist()]
            ids = torch.stack([table.ids(at, at + step).reshape(-1)[:width] for at in places]).long()
            mask = torch.ones_like(ids)
            if table.mask is not None:
                mask = torch.stack([table.mask(at, at + step).reshape(-1)[:width] for at in places]).long()
        what = f"{len(ids)} of {count:,} sequences of {width} tokens from {self.path.name}"
        return padded_left(ids, mask, f"{what} (seed {spec.seed}{self.asked_for(len(ids))})")

    @contextmanager
    def _open(self) -> Iterator[_Table]:
        path = self.path
        if not path.is_file():
            raise InputError("there is no such file", place=str(path), remedy=forms())
        if not os.path.getsize(path):
            raise InputError("it holds no tokens", place=str(path), remedy=_REMEDY)
        with ExitStack() as stack:
            with reading(path, "cannot be read as token ids", _REMEDY):
                table = stack.enter_context(_READERS[path.suffix.lower()](path))
            if len(table.shape) not in (1, 2):
                raise InputError(f"its ids are {list(table.shape)}", place=str(path), remedy=_REMEDY)
            if 0 in table.shape:
                raise InputError("it holds no tokens", place=str(path), remedy=_REMEDY)
            yield table


def _mapped(array: Any, path: Path) -> _Table:
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"it holds {array.dtype}, not integers", place=str(path), remedy=_REMEDY)
    return _Table(array.shape, lambda begin, end: torch.from_numpy(array[begin:end].astype(np.int64)))


@contextmanager
def _npy(path: Path) -> Iterator[_Table]:
    yield _mapped(np.load(path, mmap_mode="r", allow_pickle=False), path)


@contextmanager
def _bin(path: Path) -> Iterator[_Table]:
    if os.path.getsize(path) % 4:
        raise InputError(
            f"{os.path.getsize(path):,} bytes are not a whole number of int32", place=str(path), remedy=_REMEDY
        )
    yield _mapped(np.memmap(path, dtype="<i4", mode="r"), path)


@contextmanager
def _safetensors(path: Path) -> Iterator[_Table]:
    with safe_open(path, "pt") as file:
        if not (names := set(file.keys())):
            raise InputError("holds no tensors", place=str(path), remedy=_REMEDY)
        name = "input_ids" if "input_ids" in names else next(iter(names), "")
        if len(names - {name, "attention_mask"}):
            raise InputError(f"holds {len(names)} tensors, but no input_ids", place=str(path), remedy=_REMEDY)
        ids, mask = file.get_slice(name), None
        if not ids.get_dtype().startswith(("I", "U")):
            raise InputError(f"it holds {ids.get_dtype()}, not integers", place=str(path), remedy=_REMEDY)
        if "attention_mask" in names:
            mask = file.get_slice("attention_mask")
            if mask.get_shape() != ids.get_shape():
                raise InputError("attention_mask has another shape than input_ids", place=str(path), remedy=_REMEDY)
        yield _Table(
            tuple(ids.get_shape()), lambda begin, end: ids[begin:end],
            None if mask is None else lambda begin, end: mask[begin:end],
        )  # fmt: skip


_READERS = {".npy": _npy, ".bin": _bin, ".safetensors": _safetensors}
