"""What a format of checkpoints of codes is, and the registry through which it is found.

A format is one class in one file: it recognizes what a config says, finds the weights that are codes by the names and
shapes of tensors alone, and reads each of them in two ways. `decode` gives the codes as this package keeps them.
`formula` computes the float weight as the method's own library publishes it, from the packed tensors, in float64, and
shares nothing with `decode`: an export compares the two.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from ...errors import CaptureError
from ...plugins import import_plugins
from ...quant.formats import QuantizedWeight, Scheme

Section = Mapping[str, Any]  # what a config says of how weights were quantized
Read = Callable[[str], Tensor]  # a tensor of the checkpoint as it is stored, by name

# Scales of keys and of values by what follows the path of their attention, in the order in which they are looked for.
CACHE_SCALES = (
    ("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("k_proj.output_scale", "v_proj.output_scale"),
)  # fmt: skip
CACHE_LEFT_OUT = (
    "the checkpoint's settings for a quantized cache are left out: the cache stays float, or is 8 bits by a recipe "
    "that says so"
)
# What is said of codes whose groups have an offset.
OFFSETS = ", and the minimums of groups in a product beside it"
REQUANTIZE = "Export it with --requantize RECIPE, which goes through float, or export the float model it was made from"


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before it is read: its dtype, as safetensors calls it, and its shape.

    metadata: what the header of the file says besides, of whatever it is.
    """

    dtype: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False, kw_only=True)


@dataclass(frozen=True, eq=False)
class Order:
    """In which order codes take the input features.

    Attributes:
        features: int64 [K]: column j of the codes is of input feature features[j].
    """

    features: Tensor

    def undo(self, columns: Tensor) -> Tensor:
        """Columns [N, K] in the order of the input features."""
        out = torch.empty_like(columns)
        out[:, self.features] = columns
        return out


@dataclass(frozen=True, eq=False)
class Given:
    """The codes of a weight.

    Attributes:
        weight: codes, scales and zero points.
        order: of their columns; None where it is that of the input features.
        input_scale: of its input, where that is rounded with one calibrated scale.
        offset: float64 [N, G], what is added to every weight of a group; None where codes and scales are all.
        factor: float32 [K], by which the input is multiplied first; None for nothing.
    """

    weight: QuantizedWeight
    order: Order | None = None
    input_scale: float | None = None
    offset: Tensor | None = None
    factor: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K], its columns in the order of the input features."""
        values = self.weight.dequantize()
        if self.offset is not None:
            scale, size = self.weight.scale.double(), self.weight.format.group_size
            size = size if size > 0 else values.shape[1]
            # In float64, as a sum may be near 0: it is rounded once.
            values = self.weight.codes.double() * scale.repeat_interleave(size, 1)
            values = (values + self.offset.repeat_interleave(size, 1)).float()
        if self.order is not None:
            values = self.order.undo(values)
        return values if self.factor is None else values * self.factor


@dataclass(frozen=True)
class CodedWeight(ABC):
    """A weight that is stored as codes, told from names and shapes.

    Attributes:
        name: of the float tensor that it stands for, such as "model.layers.0.mlp.up_proj.weight".
        shape: of that tensor, (out_features, in_features).
        parts: names of the tensors that hold it; no other reads them.
        scheme: what keeps the codes as they are; None where nothing does, and the weight becomes float.
        kept: how, in words: "as stored", or what is different; where it becomes float, why.
        scale_dtype: of its scales in the checkpoint, as safetensors calls it.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    scheme: Scheme | None
    kept: str
    scale_dtype: str

    @property
    def has_offset(self) -> bool:
        """Whether a number is added to the weights of every group."""
        return False

    @property
    def offsets(self) -> int:
        """How many numbers there are beside codes, scales and zero points: one for every group that has an offset."""
        if self.scheme is None or not self.has_offset:
            return 0
        size = self.scheme.weight.group_size
        return self.shape[0] * (-(-self.shape[1] // size) if size > 0 else 1)

    @abstractmethod
    def decode(self, read: Read) -> Given | Tensor:
        """The codes in the format of the scheme; without a scheme the float32 weight [N, K].

        Raises:
            CaptureError: the tensors contradict what the config says of them.
        """

    @abstractmethod
    def formula(self, read: Read) -> Tensor:
        """The weight [N, K] as the method's own library publishes it, float64."""


@dataclass(frozen=True)
class CodedStack:
    """Matrices of one kind in one tensor, as the experts of a layer are: [count, K, N], of which products read one.

    Attributes:
        name, parts, scale_dtype: see `CodedWeight`; shape: of the float tensor.
        each: any of the matrices as the weight [N, K] of its product; it reads parts by their name, cut to that matrix.
    """

    name: str
    shape: tuple[int, int, int]
    parts: tuple[str, ...]
    each: CodedWeight

    @property
    def scale_dtype(self) -> str:
        return self.each.scale_dtype

    def decode(self, read: Read) -> Tensor:
        """The float32 tensor."""
        return torch.stack([_float(self.each.decode(cut)) for cut in self._cuts(read)]).transpose(1, 2).contiguous()

    def formula(self, read: Read) -> Tensor:
        """The same as the method's own library publishes it, float64."""
        return torch.stack([self.each.formula(cut) for cut in self._cuts(read)]).transpose(1, 2).contiguous()

    def _cuts(self, read: Read) -> list[Read]:
        return [partial(_cut, read, number) for number in range(self.shape[0])]


def _cut(read: Read, number: int, part: str) -> Tensor:
    return read(part)[number]


def _float(found: Given | Tensor) -> Tensor:
    return found.dequantize() if isinstance(found, Given) else found


class CodedCheckpoint(ABC):
    """How one method keeps weights in a checkpoint. Subclasses are frozen dataclasses of what a config says.

    Attributes:
        title: what people call it.
    """

    title: ClassVar[str]

    @classmethod
    @abstractmethod
    def match(cls, said: Section) -> Self | None:
        """The format of a config; None where the config speaks of another method.

        Raises:
            CaptureError: it is this method, in a form that is not read; says which.
        """

    @property
    @abstractmethod
    def described(self) -> str:
        """The method with its sizes, such as "GPTQ, 4 bits in groups of 128"."""

    @property
    def cache_numbers(self) -> str:
        """How keys and values are rounded, with scales in the checkpoint: "int" or "e4m3"; empty where they are not."""
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What an export leaves out of what the config says, a sentence each."""
        return ()

    @abstractmethod
    def find(self, tensors: Mapping[str, Header], read: Read) -> Sequence[CodedWeight | CodedStack]:
        """The weights that are codes.

        Args:
            tensors: of the checkpoint, by name.
            read: for tensors of a few bytes that say what shape or kind a weight has; weights are not read here.

        Raises:
            CaptureError: a tensor has a shape that the config contradicts.
        """


ENTRY_POINTS = "qexport.checkpoints"  # packages that bring formats name their modules under this group

_C = TypeVar("_C", bound=type[CodedCheckpoint])
_FORMATS: list[type[CodedCheckpoint]] = []


def coded_checkpoint(cls: _C) -> _C:
    """Register a format."""
    _FORMATS.append(cls)
    return cls


def forget(cls: type[CodedCheckpoint]) -> None:
    """Take a format out of the registry again."""
    _FORMATS.remove(cls)


def format_of(said: Section) -> CodedCheckpoint | None:
    """The format that a config speaks of; None where no format reads it.

    Raises:
        CaptureError: see `CodedCheckpoint.match`.
    """
    _import_others()
    return next((found for cls in _FORMATS if (found := cls.match(said)) is not None), None)


@cache
def _import_others() -> None:
    import_plugins(ENTRY_POINTS, "formats of checkpoints")


def siblings(tensors: Mapping[str, Header], ending: str) -> Iterable[tuple[str, str]]:
    """(path of the module, name of the tensor) of every tensor of this ending, such as ".qweight"."""
    return ((name.removesuffix(ending), name) for name in sorted(tensors) if name.endswith(ending))


def present(tensors: Mapping[str, Header], name: str) -> str:
    """The name of a tensor that has to be there.

    Raises:
        CaptureError: it is not.
    """
    if name not in tensors:
        raise CaptureError(
            "is missing from the checkpoint, which has the other parts of this quantized weight", place=name
        )
    return name


def expect(tensors: Mapping[str, Header], name: str, shape: tuple[int, ...]) -> str:
    """The name of a tensor that has to be there in this shape.

    Raises:
        CaptureError: it is not.
    """
    present(tensors, name)
    if tensors[name].shape != shape:
        raise CaptureError(
            f"has shape {list(tensors[name].shape)}, but the config and the tensors beside it imply {list(shape)}",
            place=name, remedy="The config does not belong to these weights",
        )  # fmt: skip
    return name


def beside(tensors: Mapping[str, Header], path: str, endings: Iterable[str]) -> tuple[str, ...]:
    """Names of those tensors of a module that are there."""
    return tuple(name for ending in endings if (name := f"{path}.{ending}") in tensors)
