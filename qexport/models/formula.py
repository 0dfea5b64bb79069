"""The tensors of a checkpoint of codes as its method's library computes them: a reading apart from the export's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from .coded import CodedCheckpoint, Header
from .files import weight_files

if TYPE_CHECKING:
    from .source import ModelFolder

_NAMES = {  # of dtypes, as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def formula_tensors(folder: "ModelFolder", codes: CodedCheckpoint) -> dict[str, Tensor]:
    """All tensors by the names that a float checkpoint has, float32; those of codes by `CodedWeight.formula`.

    The whole checkpoint is in memory.
    """
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder.path, folder.stated_weights).read:
        stored |= load_file(folder.path / file)
    made = {}
    for weight in codes.find(_headers(stored), stored.__getitem__):
        made[weight.name] = weight.formula(stored.__getitem__).float()
        for part in weight.parts:
            stored.pop(part, None)
    return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()} | made


def _headers(stored: Mapping[str, Tensor]) -> dict[str, Header]:
    return {name: Header(_NAMES[t.dtype], tuple(t.shape)) for name, t in stored.items()}
