"""What finished blocks depend on, as one hash: an interrupted export goes on only where all of it is the same."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from ..artifact.checksums import sampled
from ..capture.graph import CapturedModel
from ..errors import NumericsError
from ..models.lora import WEIGHTS as ADAPTER
from ..passes.base import GraphPass
from ..recipe.recipe import Recipe
from . import shards
from .block_activations import Stream

_LIBRARIES = ("qexport", "torch", "transformers", "numpy", "safetensors")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_CODE = (".py",)  # of a model that brings its own


def fingerprint_of(
    captured: CapturedModel,
    recipe: Recipe,
    decided: Any,
    batches: Callable[[], Stream] | None,
    extra_passes: Sequence[GraphPass],
) -> str:
    """Hash the model (graph, constants, weights), recipe, decisions, calibration data, passes and library versions.

    The files of a checkpoint are known by their size and time and by bytes from all over them: reading gigabytes would
    cost as much as what is saved. Where a model has no files, every byte of its tensors counts.

    Args:
        decided: what target, dtype and plan say, in types whose repr says everything.
        batches: makes the calibration data; None where there are none.
    """
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    add(*_versions(), recipe.to_yaml(), repr(decided))
    for step in extra_passes:
        add(type(step).__qualname__, repr(step), _source(type(step)))
    for block in captured.blocks:
        add(json.dumps(shards.record_of(block)))
    add(repr(captured.inputs), repr(captured.outputs), repr(captured.settings), repr(captured.tied))
    _tensors(add, captured.constants.items())
    if captured.folder is not None:
        config = captured.folder.config.to_dict()
        config.pop("_name_or_path", None)  # the same model elsewhere is the same
        add(json.dumps(config, sort_keys=True, default=repr))
        if captured.folder.codes is not None:
            add(repr(captured.folder.codes))
        if (adapter := captured.folder.adapter) is not None:
            add(repr(sorted(adapter.changes.items())))
            sampled(adapter.folder / ADAPTER, digest)
        for file in sorted(captured.folder.path.iterdir()):
            if file.suffix in (*_WEIGHTS, *_CODE) and file.is_file():
                add(file.name, str(file.stat().st_mtime_ns))
                sampled(file, digest)
    else:
        for name in dict.fromkeys(name for block in captured.blocks for name in block.parameters):
            try:
                _tensors(add, [(name, captured.load(name))])
            except NumericsError as error:  # the block that reads it refuses it
                add(str(error))
    if batches is not None:
        stream = batches()
        for batch in stream.batches:
            _tensors(add, sorted(batch.items()))
        _tensors(add, ((str(index), mask) for index, mask in enumerate(stream.masks) if mask is not None))
        apart = ((m, c) for m, c in zip(stream.masks, stream.counted, strict=True) if c is not None and c is not m)
        _tensors(add, (("counted", counted) for _, counted in apart))
    return digest.hexdigest()


def _tensors(add: Callable[..., None], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        add(name, f"{plain.dtype} {tuple(plain.shape)}", plain.reshape(-1).view(torch.uint8).numpy().data)


def _source(kind: type) -> str:
    """The code of a pass, where it is in a file."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


@cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {version(name)}" for name in _LIBRARIES)
