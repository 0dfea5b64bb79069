"""What travels together through an export, a dry run and a validation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..capture.module import Inputs
from ..device import Placement, placement_of
from ..errors import InputError
from ..lower.attention_plan import check_attention
from ..lower.operator_set import OperatorSet, operators_of
from ..models.lora import Adapter
from ..passes.base import GraphPass
from ..progress import Progress, no_progress
from ..validation.gates import Gates

LOGITS = ("all", "last")


@dataclass(frozen=True)
class Options:
    """How an export is made, whatever the model; every stage sees it.

    Attributes:
        target: name of what the file is for.
        dtype: of what stays float, by name; None takes the target's first one.
        attention: of a decoder, "grouped" or "standard".
        logits: of a decoder, "all" or "last".
        max_length: of a decoder, the longest text with what follows it; None takes that of the model.
        form: "native" or "qdq".
        opset: of the form qdq; None takes the one of native files.
        resume: go on with an interrupted export.
        extra_passes: of the caller, run on every block before those of the recipe.
        seed: of everything random, in the place of the recipe's; None leaves that.
        requantize: weights that are codes in the checkpoint go through float, and the recipe finds others.
        trust_remote_code: run Python code that comes with the model.
        progress: told how far the work is.
        device: where PyTorch computes, by its name of it.
        offload: activations between blocks wait in the host's memory.
        adapters: those that stay apart from the weights, by name.

    Raises:
        InputError: attention, logits or form are called otherwise; there is no such opset, device or length.
    """

    target: str = "cpu"
    dtype: str | None = None
    attention: str = "grouped"
    logits: str = "all"
    max_length: int | None = None
    form: str = "native"
    opset: int | None = None
    resume: bool = False
    extra_passes: Sequence[GraphPass] = ()
    seed: int | None = None
    requantize: bool = False
    trust_remote_code: bool = False
    progress: Progress = no_progress
    device: str = "cpu"
    offload: bool = False
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    placement: Placement = field(init=False)
    operators: OperatorSet = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement", placement_of(self.device, self.offload))
        object.__setattr__(self, "operators", operators_of(self.form, self.opset))
        check_attention(self.attention)
        if self.logits not in LOGITS:
            raise InputError(f"unknown logits {self.logits!r}", remedy=f"Logits are {' or '.join(LOGITS)}")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"a text cannot have {self.max_length} tokens", place="max_length", remedy="Use 1 or more")

    @property
    def deployed_attention(self) -> str:
        """`attention`; standard where files have the operators of ONNX alone."""
        return self.attention if self.operators.contrib else "standard"


@dataclass(frozen=True)
class ValidationOptions:
    """How an export is compared with its float model; `validate` says what each of these means.

    Attributes:
        text: what both read.
        windows: stretches of it.
        window: tokens in each; None leaves that to the kind of the model.
        inputs: what is read instead of text.
        threads: of an ONNX Runtime operator.
        provider: ONNX Runtime's name of the execution provider; None takes the one the file was made for.
        references: also measure other forms of the float model.
        greedy: new tokens that both write.
        sensitivity: also measure what each linear costs.
        trust_remote_code: run Python code that comes with the reference.
        progress: told how far the work is.
        device: where PyTorch computes the float model, by its name of it.
        gates: limits that the export has to keep.
        out: folder for the report of a file that qexport did not write; None: beside it.

    Raises:
        InputError: a number of tokens below 0; there is no such device.
    """

    text: str | os.PathLike[str] | None = None
    windows: int = 8
    window: int | None = None
    inputs: Sequence[Inputs] | Sequence[str] | torch.Tensor | None = None
    threads: int | None = None
    provider: str | None = None
    references: bool = False
    greedy: int = 32
    sensitivity: bool = False
    trust_remote_code: bool = False
    progress: Progress = no_progress
    device: str = "cpu"
    gates: Gates = Gates()
    out: Path | None = None
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement", placement_of(self.device))
        if self.greedy < 0:
            raise InputError(
                f"{self.greedy} new tokens cannot be written", place="greedy", remedy="Use 0 for none"
            )
