"""A model of a folder without its weights, which stay in the checkpoint: for encoders too large to be loaded whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from ..errors import CaptureError, root_cause
from ..models.checkpoint import Checkpoint, check_shapes
from ..models.leftovers import check_leftovers
from ..models.quiet import quiet_transformers
from ..models.source import ModelFolder
from .stored import aliases_of, convert_names

LARGE = 2e9  # bytes of float32 weights from which on models are not loaded whole


@dataclass(frozen=True)
class Streamed:
    """A float32 model whose parameters are fake.

    Attributes:
        fake: the mode of its parameters.
        checkpoint: has them, under the model's names for them.
        absent, left_out, notes: as of `models.loading.Loaded`.
    """

    model: PreTrainedModel
    fake: FakeTensorMode
    checkpoint: Checkpoint
    absent: list[str]
    left_out: list[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StreamedWeights:
    """Tensors that a graph made of others, buffers of the model, and what the checkpoint has."""

    checkpoint: Checkpoint
    made: Mapping[str, Tensor]

    def load(self, name: str) -> Tensor:
        found = self.made.get(name)
        if found is None:
            return self.checkpoint.load(name)
        return found.float() if found.is_floating_point() else found


def open_streamed(folder: ModelFolder, loader: type[Any]) -> Streamed | None:
    """A large float model as transformers builds it, its weights not read; None for a small one, or one of codes.

    Args:
        loader: an auto class of transformers.

    Raises:
        CaptureError: transformers cannot build it, the checkpoint does not fit its config, or a tensor that belongs to
            a weight is not read.
    """
    if folder.codes is not None or folder.adapter is not None:
        return None
    checkpoint = Checkpoint(folder.path, folder.stated_weights)
    try:
        with init_empty_weights(include_buffers=False), quiet_transformers():
            model = loader.from_config(
                folder.config, dtype=torch.float32, trust_remote_code=folder.trust_remote_code
            ).eval()
        model.tie_weights()
    except Exception as error:  # whatever a model's code makes of a config
        raise CaptureError(f"transformers cannot build it ({root_cause(error)})", place=folder.name) from error
    if 4 * sum(p.numel() for p in model.parameters()) <= LARGE:
        return None
    convert_names(checkpoint, folder, model)
    aliases, prefix = aliases_of(model), getattr(model, "base_model_prefix", "")
    absent = checkpoint.resolve(aliases, prefix)
    unread = checkpoint.unread() - _read_buffers(model, checkpoint, prefix)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    left_out = check_leftovers(checkpoint.names(), unread, absent, checkpoint.is_zero, ignored)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in absent}
    check_shapes(checkpoint, shapes)
    return Streamed(model, _faked(model), checkpoint, sorted(absent), left_out, checkpoint.notes)


def _read_buffers(model: PreTrainedModel, checkpoint: Checkpoint, prefix: str) -> set[str]:
    """Read the buffers that the checkpoint has; returns its names of them."""
    read, kept = set(), model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept and (found := checkpoint.find(name, prefix)) is not None:
            read.add(found)
            if buffer.is_floating_point():
                buffer.copy_(checkpoint.load(found))
    return read


def _faked(model: torch.nn.Module) -> FakeTensorMode:
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake_parameters(model, fake)
    return fake


def fake_parameters(model: torch.nn.Module, fake: FakeTensorMode) -> None:
    """Put fake parameters in the place of a model's; tied ones stay tied."""
    twins: dict[int, torch.nn.Parameter] = {}
    with fake:
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            if id(parameter) not in twins:
                twins[id(parameter)] = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
                )
            setattr(model.get_submodule(owner), leaf, twins[id(parameter)])
