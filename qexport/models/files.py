"""Which files of a folder are the weights: those that transformers reads, in its order of precedence."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STATED, INDEX_SUFFIX = "transformers_weights", ".index.json"  # a key of the config that names other files, or an index
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class WeightFiles:
    """Names of files in a folder.

    Attributes:
        read: the safetensors files that are the weights, in the order in which they are read.
        notes: a sentence on other safetensors files and an index beside them, which are not read; none without such.
    """

    read: tuple[str, ...]
    notes: tuple[str, ...]


def weight_files(folder: Path, stated: str | None = None) -> WeightFiles:
    """Find the weights as transformers 5 does: what the config states, else the whole file, else those of the index.

    Args:
        stated: the config's STATED, a safetensors file or an index of such.

    Raises:
        InputError: there are none under these names, or the index is damaged or names what is not there.
    """
    first = next((file for file in (stated, WHOLE, INDEX) if file and _is_there(folder / file)), None)
    if stated and first != stated:
        raise InputError(f"names {stated} as its weights, which is missing", place=str(folder / "config.json"))
    if first is None:
        raise _nothing(folder)
    if Path(first).name != first:
        raise InputError(f"names a file outside its folder: {first!r}", place=str(folder / "config.json"))
    read = _indexed(folder / first) if first.endswith(INDEX_SUFFIX) else (first,)
    others = sorted({p.name for pattern in ("*.safetensors", INDEX) for p in folder.glob(pattern)} - {*read, first})
    some = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    return WeightFiles(read, (f"the weights are {first}, as for transformers, and not {some}",) if others else ())


def _indexed(index: Path) -> tuple[str, ...]:
    files = named_by(index)
    for file in files:
        if not _is_there(index.parent / file):
            raise InputError(f"names {file}, which is missing", place=str(index), remedy="Download the model again")
    return files


def named_by(index: Path) -> tuple[str, ...]:
    """The files that an index of safetensors files names, which need not be there.

    Raises:
        InputError: it is damaged, or names a file elsewhere or none.
    """
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("is not a valid index of safetensors files", place=str(index)) from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"names a file outside its folder: {file!r}", place=str(index))
    if not files:
        raise InputError("names no file", place=str(index), remedy="Download the model again")
    return tuple(files)


def _is_there(file: Path) -> bool:
    """Whether there is such a file; a name that is too long for a file system is the name of none."""
    try:
        return file.is_file()
    except OSError:
        return False


def _nothing(folder: Path) -> InputError:
    """Why there are no weights, by what there is."""
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if any(_SHARD.search(file) for file in others):
        return InputError(
            f"holds parts of a model ({others[0]}), but not {INDEX}, which says how many there are", place=str(folder),
            remedy="Download the model again",
        )  # fmt: skip
    if others:
        return InputError(
            f"holds {', '.join(others[:3])}, but neither {WHOLE} nor {INDEX}", place=str(folder),
            remedy=f"If these are the model's weights, named as transformers names them, call the file {WHOLE}",
        )  # fmt: skip
    if pickles:
        return InputError(
            f"holds no safetensors file but pickles ({pickles[0]}), which can run code when they are read",
            place=str(folder), remedy="Load it with transformers, save it with save_pretrained, and export that",
        )  # fmt: skip
    return InputError(
        "holds no safetensors file", place=str(folder),
        remedy="Pass a Hugging Face id, a folder with *.safetensors, or a folder with one *.gguf file",
    )  # fmt: skip
