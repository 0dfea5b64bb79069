"""Weights that a checkpoint holds under other names or in other parts than the model, such as every expert apart.

Transformers has rules for them: which tensors make a weight, and how. Here the rules are read once, on shapes alone,
and followed for one weight at a time, or for the one expert of a stack that is wanted: nothing is converted in advance.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..errors import CaptureError, root_cause

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Rule:
    """How transformers makes weights of tensors that are stored.

    Attributes:
        parts: names of the tensors, by the pattern of the rule that they match.
        target: the first weight that is made.
        converter: of transformers; None where a tensor has another name alone.
        model: without weights, as rules read sizes from it.
    """

    parts: Mapping[str, tuple[str, ...]]
    target: str
    converter: WeightConverter | None
    model: PreTrainedModel

    @property
    def by_row(self) -> bool:
        """Whether a weight is a stack whose every row is made of the tensors at its place alone."""
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        return (
            isinstance(first, MergeModulelist) and first.dim == 0
            and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)
        )  # fmt: skip

    def apply(self, read: Read, row: int | None = None) -> dict[str, Tensor]:
        """All weights that are made, by name; row: of a stack, for a stack of that row alone.

        Raises:
            CaptureError: the tensors do not fit together.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        if self.converter is None:
            ((name,),) = self.parts.values()
            return {self.target: read(name)}
        made: Any = deepcopy(self.converter)
        for pattern, names in self.parts.items():
            tensors: list[Any] = [read(name) for name in names[rows]]  # or what will give them, in transformers
            made.collected_tensors[pattern] = tensors
        try:
            return made.convert(self.target, model=self.model, config=self.model.config)
        except Exception as error:  # whatever tensors of strange shapes make of a rule
            raise CaptureError(
                f"cannot be built from {next(iter(self.parts.values()))[0]} and others like it ({root_cause(error)})",
                place=self.target, remedy="The config does not belong to these weights, or the download is incomplete",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class MadeWeight:
    """A weight that a rule makes; the shape is that of what the rule makes of the stored shapes."""

    name: str
    shape: tuple[int, ...]
    rule: Rule

    @property
    def parts(self) -> list[str]:
        return [name for names in self.rule.parts.values() for name in names]

    def load(self, read: Read, row: int | None = None) -> Tensor:
        """The weight, or a row of it, in the dtype that is stored."""
        if row is not None and self.rule.by_row:
            return self.rule.apply(read, row)[self.name][0]
        whole = self.rule.apply(read)[self.name]
        return whole if row is None else whole[row]


def converted(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[MadeWeight]:
    """The weights and stored buffers of a model that its checkpoint has under other names or in parts.

    Args:
        model: without weights.
        shapes: of all tensors in the checkpoint.

    Raises:
        CaptureError: tensors that make a weight together do not fit together.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[tuple[str, bool], dict[str, list[str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target == name or target not in own or name in own:
            continue
        found.setdefault((target, pattern is not None), {}).setdefault(pattern or name, []).append(name)
    made: list[MadeWeight] = []
    for (target, converts), parts in found.items():
        converter = by_pattern[next(iter(parts))] if converts else None
        rule = Rule({pattern: tuple(names) for pattern, names in parts.items()}, target, converter, model)
        results = rule.apply(lambda name: torch.empty(shapes[name], device="meta"))
        made += [MadeWeight(name, tuple(tensor.shape), rule) for name, tensor in results.items()]
    return made
