"""What a folder's model of pictures or sound reads: tensors that its processor made, or chance."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifact.cache_names import TOKEN_IDS
from ..capture.graph import Port
from ..errors import InputError
from ..recipe.recipe import CalibrationSpec
from .sources import source_of

_MASK = "attention_mask"
_REMEDY = "Give what the model's processor makes"


def read_features(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        names: of the inputs that they are for; a file with one tensor may call it as it likes where there is one.

    Raises:
        InputError: it cannot be read, or lacks one.
    """
    path = Path(path).expanduser()
    try:
        with safe_open(path, "pt") as file:
            held = list(file.keys())
            if len(held) == len(names) == 1:
                return {names[0]: file.get_tensor(held[0])}
            if missing := [name for name in names if name not in held]:
                raise InputError(f"holds {len(held)} tensors, but no {missing[0]}", place=str(path), remedy=_REMEDY)
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot be read as safetensors ({error})", place=os.fspath(path),
            remedy="Save what the model's processor or feature extractor makes with safetensors",
        ) from None  # fmt: skip


def makes_none(what: str) -> InputError:
    """The error for a model that is to calibrate on what it makes itself, and makes none."""
    return InputError(
        f"the model cannot make its own {what} to calibrate on", place="calibration",
        remedy="Pass what its processor or feature extractor makes in a safetensors file: --calibration FILE; where "
        "it has batch norms, --calibration norms makes some; random numbers (--calibration random) cost accuracy",
    )  # fmt: skip


def drawn_features(ports: Sequence[Port], rows: int, seed: int, tokens: int = 0) -> dict[str, Tensor]:
    """Random numbers of mean 0 and variance 1, which say little of the model, in the sizes it was traced with.

    Args:
        tokens: how many a model has that reads texts beside them; its other integers are ones.
    """
    random = torch.Generator().manual_seed(seed)

    def drawn(port: Port) -> Tensor:
        sizes = (rows, *port.sizes[1:])
        if port.dtype.is_floating_point:
            return torch.randn(sizes, generator=random)
        read = tokens and port.name == TOKEN_IDS
        return torch.randint(tokens, sizes, generator=random) if read else torch.ones(sizes, dtype=port.dtype)

    return {port.name: drawn(port) for port in ports}


def checked_features(values: Mapping[str, Tensor], ports: Sequence[Port], place: str) -> dict[str, Tensor]:
    """Tensors that fit their inputs, float32 where those are floating-point, as many rows in each.

    Raises:
        InputError: one does not.
    """
    for port in ports:
        value: Any = values.get(port.name)
        shape = list(value.shape) if isinstance(value, Tensor) else None
        fits = shape is not None and len(shape) == len(port.dims) and all(
            isinstance(wanted, str) or size == wanted for size, wanted in zip(shape, port.dims, strict=True)
        )  # fmt: skip
        if not fits or not len(value):
            sizes = ", ".join(["n", *map(str, port.dims[1:])])
            found = shape if shape is not None else type(value).__name__
            raise InputError(f"{port.name} is {found}, not [{sizes}]", place=place, remedy=_REMEDY)
    if len({len(values[port.name]) for port in ports}) > 1:
        raise InputError("its tensors have different numbers of rows", place=place, remedy=_REMEDY)
    return {
        port.name: values[port.name].to(torch.float32 if port.dtype.is_floating_point else port.dtype) for port in ports
    }  # fmt: skip


def feature_batches(
    ports: Sequence[Port], spec: CalibrationSpec, data: Any, place: str, what: str, given: str,
    module: torch.nn.Module | None = None, tokens: int = 0,
) -> tuple[list[dict[str, Tensor]], str, bool]:
    """Batches of what a recipe names, or of `data`; what they are, for reports; whether chance made them.

    Args:
        data: rows of the first input; None for what the recipe names, which is no text.
        place: of `data`, for errors.
        what, given: what a row is called there, and rows of the caller's.
        module: the model, for sources that take it; None where it is not in memory as a whole.
        tokens: see `drawn_features`.

    Raises:
        InputError: they cannot be had, or do not fit the inputs.
    """
    names = [port.name for port in ports]
    if data is None and spec.source == "random":
        drawn = drawn_features(ports, spec.samples, spec.seed, tokens)
        described = f"{spec.samples} {what} of random numbers (seed {spec.seed})"
        return batched(drawn, spec.samples, spec.batch_size), described, True
    if data is None and (source := source_of(spec)).makes_features:
        if floats := [port.name for port in ports if not port.dtype.is_floating_point]:
            raise InputError(f"{spec.source} makes floating-point inputs only", place=floats[0], remedy=_REMEDY)
        made, described = source.features(module, drawn_features(ports, spec.samples, spec.seed))
        return batched(made, spec.samples, spec.batch_size), f"{spec.samples} {what} {described}", False
    found = checked_features(read_features(spec.source, names) if data is None else {names[0]: data}, ports, place)
    rows = min(len(found[names[0]]), spec.samples)
    described = given if data is not None else f"{what} of {Path(spec.source).name}"
    return batched(found, rows, spec.batch_size), f"{rows} {described}", False


def sources_of_lengths(
    port: Port, spec: CalibrationSpec, data: Any, given: str
) -> tuple[list[Tensor] | None, str]:
    """Rows of different lengths without padding, the first `spec.samples` of them, and what they are.

    Args:
        port: of the input that they are for, whose second dimension is their length.
        data: a list of tensors; or tensors by name, padded on the right, with an attention_mask. None for those of the
            file that the recipe names.
        given: what the caller's rows are called.

    Returns:
        (None, "") where the rows are of one length, or chance makes them.

    Raises:
        InputError: they do not fit the input, or the mask does not fit them.
    """
    place = "sources"
    if data is None:
        if not os.path.exists(Path(spec.source).expanduser()):
            return None, ""
        place, data = spec.source, _with_mask(spec.source, port.name)
    if isinstance(data, Mapping) and (mask := data.get(_MASK)) is not None:
        data = _cut(data.get(port.name), mask, port, place)
    if not isinstance(data, list | tuple):
        return None, ""
    rows = [
        checked_features({port.name: row[None] if isinstance(row, Tensor) else row}, [port], place)[port.name][0]
        for row in data[: spec.samples]
    ]
    what = given if place == "sources" else f"{port.name} of {Path(place).name}"
    return rows, f"{len(rows)} {what}"


def _with_mask(path: str, name: str) -> dict[str, Tensor] | None:
    """Tensors of a file that has a mask; None of one that has none."""
    try:
        return read_features(path, [name, _MASK])
    except InputError:
        return None


def _cut(value: Any, mask: Any, port: Port, place: str) -> list[Tensor]:
    """Rows as long as a mask says."""
    value = checked_features({port.name: value}, [port], place)[port.name]
    if not isinstance(mask, Tensor) or mask.shape != value.shape[:2] or not bool(mask.bool().any(1).all()):
        raise InputError(
            f"its mask does not say of each of {len(value)} rows of {value.shape[1]} what is no padding", place=place,
            remedy=_REMEDY,
        )  # fmt: skip
    return [row[kept.bool()] for row, kept in zip(value, mask, strict=True)]


def batched(values: Mapping[str, Tensor], rows: int, size: int) -> list[dict[str, Tensor]]:
    """The first rows, at most `size` of them together."""
    parts = {name: tensor[:rows].split(size) for name, tensor in values.items()}
    return [dict(zip(parts, group, strict=True)) for group in zip(*parts.values(), strict=True)]
