"""Adapters that stay apart from the weights: what they ask of a recipe and of a model."""

import os
import re
from collections.abc import Mapping

from ..errors import InputError
from ..lower.adapter_inputs import check_kept
from ..models.lora import Adapter, open_adapter
from ..models.source import ModelFolder
from ..recipe.registry import Stage
from .stages.preparing import Preparation

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def kept_adapters(named: Mapping[str, str | os.PathLike[str]]) -> dict[str, Adapter]:
    """Open adapters by the names that they are switched by.

    Raises:
        InputError: a name that is no name of a file, no adapter, or one that is more than low-rank products.
    """
    found = {}
    for name, place in named.items():
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot be the name of an adapter", place="adapter",
                             remedy="Use letters, digits, dots, dashes and underscores")  # fmt: skip
        found[name] = open_adapter(os.fspath(place))
        check_kept(found[name])
    return found


def check_adapters(prepared: Preparation) -> None:
    """Refuse a recipe under which a branch would read or make another value than its linear does in the float model.

    Raises:
        InputError: as said, or the model is no decoder on disk.
    """
    if not prepared.options.adapters:
        return
    if not isinstance(prepared.source, ModelFolder) or prepared.in_two_parts or prepared.in_three_parts:
        raise InputError("adapters can only be kept apart for decoders on disk", place="adapter", remedy="Merge it")
    moving = [m.key for m in prepared.recipe.methods if m.stage in (Stage.MODEL, Stage.EQUALIZE)]
    if moving:
        raise InputError(
            f"{prepared.recipe.name} has {moving[0]}, which moves factors between values and weights; an adapter "
            "beside them would read other values", place="adapter", remedy="Use a recipe without, or merge the adapter",
        )  # fmt: skip
