"""Operators that have no ONNX form as those of core ATen, which have one."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.export import ExportedProgram, default_decompositions

from ..errors import CaptureError, root_cause
from ..graph.translated import TRANSLATED

_PRIMITIVE = "torch._refs"  # its rules of core ATen end in operators below it


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """The same program with every operator decomposed that has no ONNX form and a rule of PyTorch's.

    Operators that have a form keep it: linears, norms and attention are quantized and fused by it. A rule may give
    operators that have neither; they stay.
    """
    return by_rules(exported, {target: rule for target, rule in _rules().items() if target not in TRANSLATED})


def by_rules(exported: ExportedProgram, rules: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
    """The same program without operators that write into a tensor, and with those decomposed that have a rule.

    Raises:
        CaptureError: PyTorch cannot follow its own rules here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return exported.run_decompositions(dict(rules))
        except Exception as error:  # as torch.export does, it raises almost anything
            raise CaptureError(
                f"torch.export cannot decompose it to core ATen: {root_cause(error)}",
                remedy="Rewrite the part of the model that is not a plain function of tensors",
            ) from error


def has_rule(target: Any) -> bool:
    """Whether an operator is decomposed where it has no ONNX form."""
    return target in _rules()


@cache
def _rules() -> dict[Any, Callable[..., Any]]:
    """Rules for every operator outside of core ATen, and for those of core ATen that give others of it."""
    rules = {**decomposition_table, **default_decompositions()}
    return {target: rule for target, rule in rules.items() if _is_function(target) and not _is_last(target, rule)}


def _is_function(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable


def _is_last(target: torch._ops.OpOverload, rule: Callable[..., Any]) -> bool:
    return torch.Tag.core in target.tags and getattr(rule, "__module__", "").startswith(_PRIMITIVE)
