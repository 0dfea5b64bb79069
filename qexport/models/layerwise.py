"""Transformers' model of a folder whose weights are read when a module runs and forgotten when it ran.

The names and parts of weights are those of transformers' rules; of a stack of experts a row is read when it is asked
for. In memory are the weights of one module, whatever the depth of the model.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import spellings
from .conversion import converted
from .files import weight_files

if TYPE_CHECKING:
    from .source import ModelFolder


class StoredWeights:
    """The float weights of a model's checkpoint, by the model's names for them.

    Args:
        model: without weights.
    """

    def __init__(self, folder: "ModelFolder", model: PreTrainedModel):
        self._folder, self._files = folder.path, dict[str, str]()
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder.path, folder.stated_weights).read:
            with safe_open(folder.path / file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  a handle is no mapping
                    self._files[name], shapes[name] = file, tuple(handle.get_slice(name).get_shape())
        self._made = {weight.name: weight for weight in converted(model, shapes)}
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        self._names = {name: names for names in groups.values() for name in names}
        self._prefix = getattr(model, "base_model_prefix", "")

    def read(self, name: str, row: int | None = None) -> Tensor | None:
        """A weight in float32, or a row of it; None where the checkpoint has none of that name."""
        names = (name, *self._names.get(name, ()))
        for found in (spelling for each in names for spelling in spellings(each, self._prefix)):
            if found in self._made:
                return self._made[found].load(self._stored, row).float()
            if found in self._files:
                return self._stored(found, row).float()
        return None

    def _stored(self, name: str, row: int | None = None) -> Tensor:
        with safe_open(self._folder / self._files[name], framework="pt") as handle:
            return handle.get_tensor(name) if row is None else handle.get_slice(name)[row]


class _Rows:
    """What an experts module takes for the stack of its matrices: a row is read when it is taken."""

    def __init__(self, weights: StoredWeights, name: str, like: Tensor):
        self._weights, self._name = weights, name
        self.shape, self.dtype, self.device = like.shape, torch.float32, torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int | Tensor) -> Tensor:
        found = self._weights.read(self._name, int(row))
        if found is None:
            raise KeyError(self._name)
        return found


def open_layerwise(
    loader: type[Any], folder: "ModelFolder", absent: Collection[str] = ()
) -> tuple[PreTrainedModel, StoredWeights]:
    """A model that reads its weights while it runs.

    Args:
        loader: an auto class of transformers.
        absent: weights that are nowhere in the checkpoint, zeros here.

    Raises:
        KeyError: another weight is nowhere in it either, when a module runs that reads it.
    """
    with init_empty_weights(include_buffers=False):
        model = loader.from_config(
            folder.config, dtype=torch.float32, attn_implementation="eager",
            trust_remote_code=folder.trust_remote_code,
        )  # fmt: skip
    model.tie_weights()
    weights = StoredWeights(folder, model)
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept and buffer.is_floating_point() and (stored := weights.read(name)) is not None:
            buffer.copy_(stored)
    for path, module in list(model.named_modules()):
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
        own = {leaf: f"{path}.{leaf}".removeprefix(".") for leaf, p in module._parameters.items() if p is not None}
        _read_while_running(module, own, weights, absent)
    return model.eval(), weights


def _read_while_running(
    module: torch.nn.Module, own: Mapping[str, str], weights: StoredWeights, absent: Collection[str]
) -> None:
    """own: the parameters of a module itself, by attribute the name in the model."""
    empty = {leaf: module._parameters[leaf] for leaf in own}
    for leaf, tensor in empty.items():
        if tensor is not None and tensor.dim() == 3 and getattr(module, "num_experts", None) == len(tensor):
            del module._parameters[leaf]
            module.__dict__[leaf] = _Rows(weights, own[leaf], tensor)
    held = [leaf for leaf in own if leaf in module._parameters]

    def load(module: torch.nn.Module, inputs: Any) -> None:
        for leaf in held:
            found = weights.read(own[leaf])
            if found is None and own[leaf] in absent:
                found = torch.zeros(module.get_parameter(leaf).shape)
            if found is None:
                raise KeyError(own[leaf])
            module._parameters[leaf] = torch.nn.Parameter(found, requires_grad=False)

    def forget(module: torch.nn.Module, inputs: Any, result: Any) -> None:
        module._parameters.update({leaf: empty[leaf] for leaf in held})

    if held:
        module.register_forward_pre_hook(load)
        module.register_forward_hook(forget)
