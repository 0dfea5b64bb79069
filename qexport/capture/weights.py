"""Reading the tensors of a checkpoint one at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CaptureError, InputError, NumericsError


class Checkpoint:
    """The safetensors files of a folder, memory-mapped; nothing is read before `load`.

    Raises:
        InputError: no safetensors file, one that the index names is missing, or one is truncated or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        for file in _safetensors(folder):
            try:
                with safe_open(folder / file, framework="pt") as handle:
                    self._files.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"cannot be read ({error})", place=str(folder / file),
                    remedy="The file is truncated or damaged: download or save it again",
                ) from error  # fmt: skip

    def names(self) -> set[str]:
        return set(self._files)

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
            candidates = [v for a in (name, *aliases) for v in (a, a.removeprefix(f"{prefix}."), f"{prefix}.{a}")]
            found = next((c for c in candidates if c in self._files), None)
            if found is None:
                missing.append(name)
            else:
                self._aliases[name] = found
        return missing

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._aliases.get(name, name)
        with safe_open(self.folder / self._files[stored], framework="pt") as handle:
            return tuple(handle.get_slice(stored).get_shape())

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor as stored, floating point ones as float32.

        Args:
            index: along its first axis, for that part of it alone.

        Raises:
            NumericsError: the tensor holds NaN or Inf.
        """
        stored = self._aliases.get(name, name)
        with safe_open(self.folder / self._files[stored], framework="pt") as handle:
            tensor = handle.get_tensor(stored) if index is None else handle.get_slice(stored)[index]
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(torch.float32)
        return check_finite(tensor, name)


class StateDict:
    """The tensors of a module that is already in memory."""

    def __init__(self, module: torch.nn.Module, made: Mapping[str, torch.Tensor] | None = None):
        """made: further tensors, computed from those of the module."""
        self._tensors = dict(module.state_dict(keep_vars=False)) | dict(made or {})
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


def _safetensors(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError("is not a valid index of safetensors files", place=str(index)) from error
        for file in files:
            if Path(file).name != file:
                raise InputError(f"names a file outside its folder: {file!r}", place=str(index))
            if not (folder / file).exists():
                raise InputError(f"names {file}, which is missing", place=str(index), remedy="Download the model again")
        return files
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            "holds no safetensors file", place=str(folder),
            remedy="Pass a Hugging Face id, a folder with *.safetensors, or a folder with one *.gguf file",
        )  # fmt: skip
    return files


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes in the checkpoint with what the architecture expects.

    Raises:
        CaptureError: a shape differs.
    """
    for name, shape in expected.items():
        stored = checkpoint.shape(name)
        if stored != shape:
            raise CaptureError(
                f"has shape {list(stored)} in the checkpoint and {list(shape)} by config.json", place=name,
                remedy="The config does not belong to these weights",
            )  # fmt: skip
