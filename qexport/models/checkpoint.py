"""Reading the tensors of a checkpoint one at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CaptureError, InputError, NumericsError
from .coded import CodedCheckpoint, CodedStack, CodedWeight, Given, Header
from .conversion import MadeWeight
from .files import weight_files
from .leftovers import FLOATS, check_float_dtype
from .lora import HEAD, Adapter


@dataclass(frozen=True)
class _Stored(Header):
    """A tensor, and the file that it is in; empty for one that is made of others."""

    file: str


@dataclass(frozen=True)
class GivenCodes:
    """A weight that the checkpoint holds as codes, to be read when they are wanted.

    Attributes:
        weight: what is known of it.
    """

    weight: CodedWeight
    _read: Callable[[str], torch.Tensor]

    def decode(self) -> Given | torch.Tensor:
        """See `CodedWeight.decode`."""
        return self.weight.decode(self._read)

    def formula(self) -> torch.Tensor:
        """See `CodedWeight.formula`."""
        return self.weight.formula(self._read)


class Checkpoint:
    """The safetensors files of a folder, memory-mapped; no tensor is read before `load`.

    Weights that are codes have the name, shape and values of the float tensor that they stand for; the tensors that
    hold them go by no name here.

    Args:
        stated: `transformers_weights` of the config, where it has that.
        codes: how weights are kept as codes; None where all are float.
        adapter: what is merged into weights; these are float then, whatever they were.

    Attributes:
        notes: a sentence where other safetensors files lie beside the weights.

    Raises:
        InputError: no weights under the names of transformers, one of the index is missing, or one is truncated or
            damaged.
        CaptureError: tensors of codes that the config contradicts.
    """

    def __init__(
        self, folder: Path, stated: str | None = None, codes: CodedCheckpoint | None = None,
        adapter: Adapter | None = None,
    ):  # fmt: skip
        self.folder, self._adapter = folder, adapter
        self._stored: dict[str, _Stored] = {}
        self._aliases: dict[str, str] = {}
        files = weight_files(folder, stated)
        self.notes = files.notes
        for file in files.read:
            try:
                with safe_open(folder / file, framework="pt") as handle:
                    metadata = handle.metadata() or {}
                    for name in handle.keys():  # noqa: SIM118  a handle is no mapping
                        part = handle.get_slice(name)
                        self._stored[name] = _Stored(part.get_dtype(), tuple(part.get_shape()), file, metadata=metadata)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"cannot be read ({error})", place=str(folder / file),
                    remedy="The file is truncated or damaged: download or save it again",
                ) from error  # fmt: skip
        self._files = {name: found.file for name, found in self._stored.items()}
        coded = [] if codes is None else codes.find(self._stored, self._part)
        self._coded = {weight.name: weight for weight in coded}
        for weight in self._coded.values():
            for part in weight.parts:
                self._stored.pop(part, None)
            self._stored[weight.name] = _Stored("F32", weight.shape, "")
        self._made: dict[str, MadeWeight] = {}
        self._table = ""  # of a head that an adapter unties: the embedding that it begins as
        if adapter is not None and adapter.unties and HEAD not in self._stored:
            self._table = self._embedding(adapter)
            self._stored[HEAD] = self._stored[self._table]
        self._changes = {} if adapter is None else adapter.placed(
            lambda name: self.find(name, name.partition(".")[0]), lambda name: self._stored[name].shape
        )  # fmt: skip

    def convert(self, made: Iterable[MadeWeight]) -> None:
        """Let weights that are made of stored tensors stand in the place of these, under their own names."""
        for weight in made:
            dtypes = sorted({self._stored[part].dtype for part in weight.parts}, key=lambda d: d in FLOATS)
            self._stored[weight.name] = _Stored(dtypes[0], weight.shape, "")
            self._made[weight.name] = weight
        for weight in self._made.values():
            for part in weight.parts:
                self._stored.pop(part, None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def names(self) -> set[str]:
        return set(self._stored)

    def parts(self) -> set[str]:
        """Names in the files of the tensors that others are made of, see `convert`."""
        return {part for weight in self._made.values() for part in weight.parts}

    def unread(self) -> set[str]:
        """Tensors that nothing was resolved to."""
        return self.names() - set(self._aliases.values())

    def find(self, name: str, prefix: str = "") -> str | None:
        """What a tensor goes by here, with or without the base model's prefix; None where there is none."""
        return next((c for c in spellings(name, prefix) if c in self._stored), None)

    def resolve(self, wanted: Mapping[str, Iterable[str]], prefix: str = "") -> list[str]:
        """Find each parameter under its own name, the name of a tied one, or with or without the base model's prefix.

        Args:
            wanted: for each parameter every name it goes by.
            prefix: `base_model_prefix` of the architecture.

        Returns:
            The parameters that the checkpoint does not have.
        """
        missing = []
        for name, aliases in wanted.items():
            found = next((f for a in (name, *aliases) if (f := self.find(a, prefix))), None)
            if found is None:
                missing.append(name)
            else:
                self._aliases[name] = found
        return missing

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[self._aliases.get(name, name)].shape

    def dtype(self, name: str) -> str:
        """As safetensors calls it."""
        return self._stored[self._aliases.get(name, name)].dtype

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values."""
        if self.shape(one) != self.shape(other):
            return False
        return torch.equal(self._raw(one), self._raw(other))

    def is_zero(self, name: str) -> bool:
        return not bool(self._raw(name).any())

    def coded(self, name: str) -> bool:
        """Whether a tensor is codes."""
        return self._aliases.get(name, name) not in self._changes and self._stored_as(name) in self._coded

    def given(self, name: str, index: int | None = None) -> GivenCodes | None:
        """The codes of a weight; None where it is float.

        Args:
            index: of a matrix of a tensor of several, for the weight [N, K] of its product.
        """
        weight = self._coded.get(self._stored_as(name)) if self.coded(name) else None
        if isinstance(weight, CodedStack):
            return None if index is None else GivenCodes(weight.each, partial(self._part, index=index))
        return None if weight is None or index is not None else GivenCodes(weight, self._part)

    def _embedding(self, adapter: Adapter) -> str:
        """The table of the base, which is its head as well."""
        found = [
            name for name, part in self._stored.items()
            if len(part.shape) == 2 and any(word in name.split(".")[-2] for word in ("embed_tokens", "wte", "embed_in"))
        ]  # fmt: skip
        if len(found) != 1:
            raise InputError(
                "changes the embedding or the head of a base that has one tensor for both, and it cannot be told "
                "which", place=adapter.name, remedy="Merge it with peft and export the result",
            )  # fmt: skip
        return found[0]

    def _raw(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        change = self._changes.get(self._aliases.get(name, name))
        if change is None or self._adapter is None:
            return self._base(name, index)
        merged = change.apply(self._base(name).float(), self._adapter.read)
        return merged if index is None else merged[index]

    def _base(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """A tensor without an adapter."""
        stored = self._stored_as(name)
        if (weight := self._coded.get(stored)) is not None:
            if isinstance(weight, CodedStack) and isinstance(index, int):
                found = weight.each.decode(partial(self._part, index=index))
                return (found.dequantize() if isinstance(found, Given) else found).t()
            found = weight.decode(self._part)
            whole = found.dequantize() if isinstance(found, Given) else found
            return whole if index is None else whole[index]
        if (made := self._made.get(stored)) is not None:
            return made.load(self._part)[index] if isinstance(index, slice) else made.load(self._part, index)
        return self._part(stored, index)

    def _stored_as(self, name: str) -> str:
        """The name of the tensor of the files that one is, or begins as."""
        found = self._aliases.get(name, name)
        return self._table if self._table and found == HEAD else found

    def _part(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """A tensor of the files, by its name in there."""
        with safe_open(self.folder / self._files[name], framework="pt") as handle:
            return handle.get_tensor(name) if index is None else handle.get_slice(name)[index]

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """A tensor as stored, floating point ones as float32.

        Args:
            index: along its first axis, for that part of it alone, or for some rows.

        Raises:
            NumericsError: the tensor holds NaN or Inf.
        """
        tensor = self._raw(name, index)
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(torch.float32)
        return check_finite(tensor, name)


class StateDict:
    """The tensors of a module that is already in memory."""

    def __init__(self, module: torch.nn.Module, made: Mapping[str, torch.Tensor] | None = None):
        """made: further tensors, computed from those of the module."""
        self.made = dict(made or {})
        self._tensors = dict(module.state_dict(keep_vars=False)) | self.made
        self._tensors.update(module.named_buffers(remove_duplicate=False))  # those that no checkpoint has, too
        self._tensors.update({n: p.detach() for n, p in module.named_parameters(remove_duplicate=False)})

    def load(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return check_finite(tensor.to(torch.float32), name) if tensor.is_floating_point() else tensor


def check_finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor itself, when it has neither NaN nor Inf; otherwise NumericsError names it."""
    # The sum of finite float32 weights is finite, and one pass without a temporary is all it takes.
    if not torch.isfinite(tensor.sum()) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericsError(
            f"{bad} of {tensor.numel()} weights are NaN or Inf", place=name, remedy="Repair the checkpoint"
        )
    return tensor


def spellings(name: str, prefix: str) -> tuple[str, ...]:
    """What a tensor may go by in a checkpoint: with or without the base model's prefix, which may be empty."""
    return (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if prefix else (name,)


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare dtypes and shapes in the checkpoint with the float tensors that the architecture expects.

    Raises:
        CaptureError: a shape differs, or a tensor is not floating point.
    """
    for name, shape in expected.items():
        check_float_dtype(name, checkpoint.dtype(name))
        stored = checkpoint.shape(name)
        if stored != shape:
            raise CaptureError(
                f"has shape {list(stored)} in the checkpoint and {list(shape)} by config.json", place=name,
                remedy="The config does not belong to these weights",
            )  # fmt: skip
