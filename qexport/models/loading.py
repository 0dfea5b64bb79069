"""Loading a whole checkpoint with transformers, for models that are not read a block at a time."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CaptureError, InputError, root_cause
from .checkpoint import Checkpoint
from .leftovers import check_float_dtype, check_leftovers, refusal, telling
from .quantized import FLOAT_MODEL
from .quiet import quiet_transformers
from .source import ModelFolder


@dataclass(frozen=True)
class Loaded:
    """A model in float32, in evaluation mode.

    Attributes:
        absent: names of weights that the checkpoint lacks, sorted: they are made up.
        left_out: tensors of the checkpoint that the model does not read, sorted.
        notes: see `Checkpoint`.
    """

    model: PreTrainedModel
    absent: list[str]
    left_out: list[str]
    notes: tuple[str, ...]


def load_known(folder: ModelFolder, loader: type[Any]) -> Loaded:
    """Load a model, and account for every tensor.

    Args:
        loader: an auto class of transformers.

    Raises:
        CaptureError: transformers cannot load it, a weight is no float, or a tensor that belongs to one is not read.
    """
    if folder.codes is not None:
        raise CaptureError(
            f"its weights are codes ({folder.codes.described}), which are only supported for decoders "
            "with transformers' names", place=folder.name, remedy=FLOAT_MODEL,
        )  # fmt: skip
    if folder.adapter is not None:
        raise InputError(
            "adapters can only be merged into decoders that write text", place=folder.adapter.name,
            remedy="Merge it with peft (merge_and_unload) and export the result",
        )  # fmt: skip
    checkpoint = Checkpoint(folder.path, folder.stated_weights)  # a damaged file is reported before the slow part
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                folder.path, dtype=torch.float32, trust_remote_code=folder.trust_remote_code, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever a model's code makes of a config
        if told := telling(checkpoint.names()):
            raise refusal(told) from error
        what = loader.__name__.removeprefix("AutoModel").removeprefix("For") or "an encoder"
        raise CaptureError(f"transformers cannot load it as {what} ({root_cause(error)})", place=folder.name) from error
    unread = _unread(checkpoint.names(), set(info["unexpected_keys"]))
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    left_out = check_leftovers(checkpoint.names(), unread, info["missing_keys"], checkpoint.is_zero, ignored)
    _check_dtypes(checkpoint, model, unread)
    return Loaded(model.eval(), sorted(info["missing_keys"]), left_out, checkpoint.notes)


def _unread(names: set[str], unexpected: set[str]) -> set[str]:
    """Names in the checkpoint of what transformers did not expect, whose modules it may have renamed on the way."""

    def tail(name: str) -> tuple[str, ...]:
        return tuple(name.split(".")[-2:])

    tails = {tail(name) for name in unexpected}
    return {name for name in names if name in unexpected or (unexpected - names and tail(name) in tails)}


def _check_dtypes(checkpoint: Checkpoint, model: torch.nn.Module, unread: Collection[str]) -> None:
    """Refuse codes where the model has a float tensor of that name."""
    prefix = getattr(model, "base_model_prefix", "")
    for name, tensor in model.state_dict().items():
        found = checkpoint.find(name, prefix)
        if found and found not in unread and tensor.is_floating_point():
            check_float_dtype(found, checkpoint.dtype(found))


def load_whole(folder: ModelFolder, loader: type[Any]) -> Loaded:
    """The same for a checkpoint that has to be complete.

    Raises:
        CaptureError: as `load_known`, or transformers has to make up weights that the checkpoint lacks.
    """
    loaded = load_known(folder, loader)
    if absent := loaded.absent:
        raise CaptureError(
            f"{len(absent)} weights are not in the checkpoint, first {absent[0]}", place=folder.name,
            remedy="The config does not belong to these weights, or the download is incomplete",
        )  # fmt: skip
    return loaded
