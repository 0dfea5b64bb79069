"""The head of a GGUF file: whether its counts and lengths stay within the file, before libraries walk along them.

Layout: magic, version, number of tensors, number of key-value pairs; the pairs; a name, the sizes, a type and an offset
for each tensor; the tensors. Numbers are little-endian, strings UTF-8 with their length in 8 bytes before.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError

_STRING, _ARRAY = 8, 9
_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number of each type
_MOST_DIMENSIONS = 4


class _Head:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def number(self, form: str) -> int:
        width = struct.calcsize(form)
        self.room(width)
        return struct.unpack(form, self._file.read(width))[0]

    def room(self, length: int) -> None:
        if length > self._size - self._file.tell():
            raise ValueError(f"{length:,} bytes are wanted at {self._file.tell():,}, and it has {self._size:,}")

    def skip(self, length: int) -> None:
        self.room(length)
        self._file.seek(length, 1)

    def string(self) -> str:
        length = self.number("<Q")
        self.room(length)
        return self._file.read(length).decode("utf-8")

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _WIDTH:
                self.skip(count * _WIDTH[inner])
                return
            if inner != _STRING:
                raise ValueError(f"an array of values of type {inner}")
            self.room(count * 8)
            for _ in range(count):
                self.skip(self.number("<Q"))
        elif kind in _WIDTH:
            self.skip(_WIDTH[kind])
        else:
            raise ValueError(f"a value of type {kind}")


def check_gguf(path: Path) -> None:
    """Refuse a file whose head is damaged or cut off.

    Raises:
        InputError: as said.
    """
    try:
        with path.open("rb") as file:
            _check(_Head(file, path.stat().st_size))
    except (OSError, ValueError) as error:
        raise InputError(
            f"is not a complete GGUF file ({error})", place=str(path),
            remedy="It is damaged or cut off: download it again"
        ) from None


def _check(head: _Head) -> None:
    if head.number("<I") != 0x46554747:
        raise ValueError("it does not begin with GGUF")
    version, tensors, pairs = head.number("<I"), head.number("<Q"), head.number("<Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}, but only 2 and 3 are known")
    head.room(pairs * 13 + tensors * 24)  # of the shortest there are
    keys = set()
    for _ in range(pairs):
        key = head.string()
        if key in keys:
            raise ValueError(f"{key!r} is there twice")
        keys.add(key)
        head.value(head.number("<I"))
    names = set()
    for _ in range(tensors):
        name, dimensions = head.string(), head.number("<I")
        if name in names:
            raise ValueError(f"tensor {name!r} is there twice")
        names.add(name)
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        count = 1
        for _ in range(dimensions):
            count *= head.number("<Q")
        head.number("<I")
        offset = head.number("<Q")
        # No type takes less than a bit and a half for a number.
        head.room(min(offset + count // 8, 2**63))
