"""The tensors of a checkpoint of codes as its method's library computes them: a reading apart from the export's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .coded import CodedCheckpoint, Header
from .files import weight_files
from .lora import HEAD, WEIGHTS, Adapter

if TYPE_CHECKING:
    from .source import ModelFolder

_NAMES = {  # of dtypes, as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def formula_tensors(folder: "ModelFolder", codes: CodedCheckpoint | None) -> dict[str, Tensor]:
    """All tensors by the names that a float checkpoint has, float32; those of codes by `CodedWeight.formula`, and those
    that an adapter changes by the formula of its paper, in float64.

    The whole checkpoint is in memory.
    """
    stored: dict[str, Tensor] = {}
    headers: dict[str, Header] = {}
    for file in weight_files(folder.path, folder.stated_weights).read:
        read = load_file(folder.path / file)
        with safe_open(folder.path / file, framework="pt") as handle:
            headers |= _headers(read, handle.metadata() or {})
        stored |= read
    made = {}
    for weight in codes.find(headers, stored.__getitem__) if codes else ():
        made[weight.name] = weight.formula(stored.__getitem__).float()
        for part in weight.parts:
            stored.pop(part, None)
    whole = {name: t.float() if t.is_floating_point() else t for name, t in stored.items()} | made
    return whole if folder.adapter is None else _adapted(whole, folder.adapter)


def _adapted(base: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors with an adapter in them; a tied head that it unties begins as the embedding does."""
    if adapter.unties and HEAD not in base:
        tables = [name for name in base if name.split(".")[-2:-1] in (["embed_tokens"], ["wte"], ["embed_in"])]
        base = {**base, HEAD: base[tables[0]]}
    read = load_file(adapter.folder / WEIGHTS)
    changed = dict(base)
    for change in adapter.changes.values():
        name = next(n for n in (change.name, change.name.partition(".")[2], f"model.{change.name}") if n in base)
        start = read[change.instead].double() if change.instead else base[name].double()
        if change.added:
            changed[name] = (base[name].double() + change.scale * start).float()
            continue
        if change.low:
            low, high = read[change.low].double(), read[change.high].double()
            across = change.embedding or change.turned
            start = start + torch.einsum("rk,nr->kn" if across else "rk,nr->nk", low, high) * change.scale
        if change.magnitude:
            inputs = 0 if change.turned else 1
            sizes = start.square().sum(inputs, keepdim=True).sqrt()
            start = read[change.magnitude].double().reshape(sizes.shape) * start / sizes
        changed[name] = start.float()
    return changed


def _headers(stored: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Header]:
    return {name: Header(_NAMES[t.dtype], tuple(t.shape), metadata=metadata) for name, t in stored.items()}
