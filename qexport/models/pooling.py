"""Embeddings of whole texts, as the files of sentence-transformers say they are made of hidden states.

modules.json names the steps: a transformer, how its tokens become one vector, linears, division by its length.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from ..artifact.files import read_json, read_text
from ..errors import InputError, reading

MODULES = "modules.json"
EMBEDDING = "sentence_embedding"  # the output, as exports of optimum call it
DENSE = "sentence_dense"  # the linears behind it, as modules of the model
_MOST = 1 << 20  # bytes


@dataclass(frozen=True)
class Dense:
    """A linear behind the pooled vector.

    Attributes:
        folder: of its config and weights.
        width: features in and out.
        bias: whether it has one.
        activation: class of torch.nn; Identity for none.
    """

    folder: Path
    width: tuple[int, int]
    bias: bool
    activation: str


@dataclass(frozen=True)
class Pooling:
    """How a text becomes a vector.

    Attributes:
        modes: names of `_POOLS`, whose vectors stand one behind the other.
        dense: linears in order.
        normalized: whether the vector is divided by its length.
    """

    modes: tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    normalized: bool = False


def _first(states: Tensor, mask: Tensor) -> Tensor:
    """Of the first real token, on whichever side padding stands."""
    return _at(states, mask.argmax(1))


def _last(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    return _at(states, (places * mask).argmax(1))


def _at(states: Tensor, place: Tensor) -> Tensor:
    return states.gather(1, place[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)


def _sum(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None].to(states.dtype)).sum(1)


def _count(states: Tensor, mask: Tensor) -> Tensor:
    return mask.to(states.dtype).sum(1, keepdim=True).clamp_min(1e-9)


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None].bool(), states, torch.finfo(states.dtype).min).amax(1)


def _weighted(states: Tensor, mask: Tensor) -> Tensor:
    """The mean with weights 1, 2, 3, ... by position."""
    weights = mask.to(states.dtype) * torch.arange(1, mask.shape[1] + 1, device=mask.device).to(states.dtype)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-9)


# By the key of a pooling config, what it makes of states [batch, sequence, features] and mask [batch, sequence]; in the
# order in which sentence-transformers concatenates them.
_POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls_token": _first,
    "max_tokens": _largest,
    "mean_tokens": lambda states, mask: _sum(states, mask) / _count(states, mask),
    "mean_sqrt_len_tokens": lambda states, mask: _sum(states, mask) / _count(states, mask).sqrt(),
    "weightedmean_tokens": _weighted,
    "lasttoken": _last,
}
_SHORT = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens":
          "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}  # fmt: skip


def read_pooling(folder: Path) -> Pooling | None:
    """How the model in a folder makes embeddings; None where its files do not say that it makes any.

    Raises:
        InputError: a step that has no form here, or a damaged file.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    modes: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalized = False
    with reading(path, "is not a list of modules of sentence-transformers"):
        steps = [(str(step["type"]).rpartition(".")[2], folder / step["path"]) for step in _listed(path)]
    for place, (kind, own) in enumerate(steps):
        if kind == "Transformer" and place == 0 and own.resolve() == folder.resolve():
            continue
        if kind == "Pooling" and place == 1:
            modes = _modes(own / "config.json")
        elif kind == "Dense" and modes and not normalized:
            dense.append(_dense(own))
        elif kind == "Normalize" and modes:
            normalized = True
        elif kind != "Dropout":
            raise InputError(
                f"step {place} is {kind}, which is not supported", place=str(path),
                remedy=f"Remove {MODULES} for hidden states, or export it as an nn.Module",
            )  # fmt: skip
    return Pooling(modes, tuple(dense), normalized) if modes else None


def _listed(path: Path) -> list[dict[str, Any]]:
    listed = json.loads(read_text(path, _MOST))
    if any(Path(step["path"]).name != step["path"] for step in listed):
        raise ValueError("it names a folder outside its own")
    return listed


def _modes(path: Path) -> tuple[str, ...]:
    said = read_json(path)
    if said.get("include_prompt") is False:
        raise InputError("leaves prompts out of the mean (include_prompt), which needs their lengths", place=str(path))
    if "pooling_mode" in said:
        named = said["pooling_mode"]
        asked = [_SHORT.get(name, str(name)) for name in ([named] if isinstance(named, str) else named)]
    else:
        asked = [key.removeprefix("pooling_mode_") for key, on in said.items() if on is True and "pooling_mode" in key]
    if not asked or not set(asked) <= _POOLS.keys():
        raise InputError(f"pools by {', '.join(asked) or 'nothing'}, which is unknown", place=str(path))
    return tuple(name for name in _POOLS if name in asked)


def _dense(folder: Path) -> Dense:
    path = folder / "config.json"
    said = read_json(path)
    with reading(path, "is not the config of a Dense step"):
        activation = str(said.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
        found = Dense(folder, (int(said["in_features"]), int(said["out_features"])), bool(said["bias"]), activation)
    if not isinstance(getattr(nn, activation, None), type):
        raise InputError(f"has the activation {activation}, which torch.nn does not have", place=str(path))
    return found


def with_pooling(model: PreTrainedModel, pooling: Pooling) -> PreTrainedModel:
    """The model, whose forward returns the vector of each text beside what it returned before; it is changed in place.

    Raises:
        InputError: the weights of a linear are missing.
    """
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self, *args, **inputs):
        made = dict(kind.forward(self, *args, **inputs))
        states, mask = made["last_hidden_state"], inputs["attention_mask"]
        vector = torch.cat([_POOLS[mode](states, mask) for mode in pooling.modes], dim=-1)
        for step, dense in enumerate(pooling.dense):
            vector = getattr(nn, dense.activation)()(getattr(self, f"{DENSE}_{step}")(vector))
        if pooling.normalized:
            vector = nn.functional.normalize(vector, p=2.0, dim=1)
        return {**made, EMBEDDING: vector}

    for step, dense in enumerate(pooling.dense):
        model.add_module(f"{DENSE}_{step}", _loaded_linear(dense))
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def _loaded_linear(dense: Dense) -> nn.Linear:
    path = dense.folder / "model.safetensors"
    if not path.is_file():
        raise InputError(
            "has no model.safetensors", place=str(dense.folder),
            remedy="Load the model with sentence-transformers and save it: pickles can run code when they are read",
        )  # fmt: skip
    linear = nn.Linear(*dense.width, bias=dense.bias)
    with reading(path, "does not hold the weights that its config speaks of"), torch.no_grad():
        held = {name.removeprefix("linear."): tensor.float() for name, tensor in load_file(path).items()}
        linear.load_state_dict(held)
    return linear


@dataclass(frozen=True)
class Pooled:
    """Loads models as `AutoModel` does, and puts a pooling behind them."""

    pooling: Pooling
    __name__ = AutoModel.__name__

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        return with_pooling(AutoModel.from_config(config, **options), self.pooling)

    def from_pretrained(self, path: Path, **options: Any) -> Any:
        made = AutoModel.from_pretrained(path, **options)
        if not options.get("output_loading_info"):
            return with_pooling(made, self.pooling)
        model, info = made
        return with_pooling(model, self.pooling), info
