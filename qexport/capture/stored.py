"""A decoder's weights in its checkpoint: found under their names, or made of its tensors, and none left over."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from ..errors import CaptureError, InputError, QExportError
from ..graph.edit import is_call
from ..graph.meta import Meta
from ..models.checkpoint import Checkpoint, GivenCodes, check_shapes
from ..models.coded.base import CACHE_SCALES
from ..models.conversion import converted
from ..models.leftovers import check_leftovers, refusal, telling
from ..models.quantized import FLOAT_MODEL
from ..models.source import ModelFolder
from .blocks import Block
from .weight_views import WeightView

Names = Mapping[str, tuple[str, ...]]


def aliases_of(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter name all names of the same tensor, the one that comes first in the model first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def convert_names(checkpoint: Checkpoint, folder: ModelFolder, model: PreTrainedModel) -> None:
    """Let a checkpoint go by the model's names where it has others, or weights in parts, as transformers reads them.

    Raises:
        CaptureError: the parts of a weight do not fit together, or are codes.
    """
    if folder.codes is not None or folder.adapter is not None:
        return  # which know their weights by the names of the checkpoint
    prefix = getattr(model, "base_model_prefix", "")
    if any(all(checkpoint.find(n, prefix) is None for n in names) for names in set(aliases_of(model).values())):
        try:
            checkpoint.convert(converted(model, checkpoint.shapes()))
        except CaptureError as error:
            if told := telling(checkpoint.names()):
                raise refusal(told) from error
            raise


def untie(model: torch.nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Give tied parameters tensors of their own where the checkpoint holds different ones, as transformers 5 does.

    Returns:
        A sentence for each.
    """
    prefix, said = getattr(model, "base_model_prefix", ""), []
    for names in set(aliases_of(model).values()):
        first, *others = [(name, found) for name in names if (found := checkpoint.find(name, prefix))] or [("", "")]
        for name, found in others:
            if found == first[1] or checkpoint.same(first[1], found):
                continue
            owner, _, leaf = name.rpartition(".")
            tied = model.get_parameter(name)
            own = torch.nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
            setattr(model.get_submodule(owner), leaf, own)
            said.append(
                f"{first[1]} and {found} differ in the checkpoint although config.json ties them "
                "(tie_word_embeddings): both are kept, as transformers does"
            )
    return sorted(said)


def find_weights(
    checkpoint: Checkpoint,
    folder: ModelFolder,
    model: torch.nn.Module,
    parameters: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, torch.Tensor],
    aliases: Names,
) -> tuple[list[str], list[str]]:
    """Find every parameter in a checkpoint.

    Args:
        parameters: the shapes of those that the graph reads.
        buffers: those that the graph reads.

    Returns:
        The buffers that it holds, though they are no parameters, such as what a router adds to its scores; and the
        tensors that nothing reads.

    Raises:
        CaptureError: a weight is missing, of another shape or no float, or a tensor that belongs to one is not read.
    """
    prefix, ignored = (
        getattr(model, "base_model_prefix", ""),
        getattr(model, "_keys_to_ignore_on_load_unexpected", None),
    )
    wanted = {name: aliases.get(name, ()) for name in parameters}
    kept = model.state_dict()
    trained = {name: tuple(b.shape) for name, b in buffers.items() if name in kept and b.is_floating_point()}
    missing = checkpoint.resolve(wanted, prefix)
    stored = _resolved(checkpoint, trained, prefix)
    unread = checkpoint.unread() - {checkpoint.find(name, prefix) for name in kept}
    names = checkpoint.names() | checkpoint.parts()
    left = check_leftovers(names, unread, missing, checkpoint.is_zero, ignored)
    if missing:
        raise _missing(missing, folder)
    check_shapes(checkpoint, {**parameters, **{name: trained[name] for name in stored}})
    return stored, left


def stored_tables(
    checkpoint: Checkpoint, model: torch.nn.Module, buffers: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Integers that a checkpoint holds for buffers, such as the experts that a token takes by its id; by name.

    Args:
        buffers: those that the graph reads.

    Raises:
        CaptureError: one has another shape there, or is of floats.
    """
    kept, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
    wanted = {n: tuple(b.shape) for n, b in buffers.items() if n in kept and b.dtype == torch.int64 and b.dim()}
    found = {}
    for name in _resolved(checkpoint, wanted, prefix):
        table = found[name] = checkpoint.load(name)
        if tuple(table.shape) != wanted[name] or table.is_floating_point():
            raise CaptureError(
                f"is {table.dtype} {list(table.shape)} in the checkpoint, and int64 {list(wanted[name])} in the model",
                place=name, remedy="The config does not belong to these weights",
            )  # fmt: skip
        found[name] = table.to(torch.int64)
    return found


def note_cache_scales(blocks: Iterable[Block], checkpoint: Checkpoint) -> None:
    """Tell every attention with a cache the scales that the checkpoint has for its keys and values."""
    for node in (node for block in blocks for node in block.module.graph.nodes):
        if not is_call(node, torch.ops.qexport.cached_attention.default):
            continue
        path = node.meta.get(Meta.MODULE_PATH, "")
        for pair in CACHE_SCALES:
            names = [name for end in pair if (name := checkpoint.find(f"{path}.{end}", "model"))]
            if len(names) == 2 and not checkpoint.resolve({name: () for name in names}):
                key, value = (float(checkpoint.load(name)) for name in names)
                node.meta[Meta.CACHE_SCALES] = (key, value)
                break


def codes_in(
    checkpoint: Checkpoint, parameters: Iterable[str], pieces: Mapping[str, WeightView]
) -> dict[str, GivenCodes]:
    """The codes of the weights that the graph reads, by their names.

    Args:
        pieces: those that are parts of a weight.

    Raises:
        CaptureError: one of those is of codes, and no product reads it as it is kept.
    """
    found = {name: checkpoint.given(name) for name in parameters if name not in pieces}
    for name, piece in pieces.items():
        found[name] = checkpoint.given(piece.source, piece.index) if piece.transposed and not piece.stacked else None
        if found[name] is None and checkpoint.coded(piece.source):
            raise CaptureError(
                "is stored as codes, but the model reads it transposed or in parts, which takes float weights",
                place=name, remedy=FLOAT_MODEL,
            )  # fmt: skip
    return {name: codes for name, codes in found.items() if codes is not None}


def _missing(missing: list[str], folder: ModelFolder) -> QExportError:
    if folder.adapter is not None:
        return InputError(
            f"is for weights with names that the model does not have, such as {missing[0]}",
            place=folder.adapter.name, remedy="Merge it with peft (merge_and_unload) and export the result",
        )  # fmt: skip
    if folder.codes is not None:
        return CaptureError(
            f"its weights are codes ({folder.codes.described}), which are only supported for decoders "
            "with transformers' names", place=folder.name, remedy=FLOAT_MODEL,
        )  # fmt: skip
    return CaptureError(
        f"{len(missing)} weights are not in the checkpoint, first {missing[0]}", place=folder.name,
        remedy="The config does not belong to these weights, or the download is incomplete",
    )  # fmt: skip


def _resolved(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], prefix: str) -> list[str]:
    missing = checkpoint.resolve({name: () for name in wanted}, prefix)
    return [name for name in wanted if name not in missing]
