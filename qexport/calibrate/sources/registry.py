"""The kinds of sources that a recipe's calibration may name, each a class that declares itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ...errors import InputError
from ...plugins import import_folder, import_plugins
from ...recipe.recipe import CalibrationSpec
from ..self_text import Generate
from .samples import Samples

# Packages that bring kinds of sources name their modules under this group.
ENTRY_POINTS = "qexport.sources"


@dataclass(frozen=True)
class Model:
    """What sources know of the model that is calibrated.

    Attributes:
        tokenizer: a transformers tokenizer; None where it has none.
        vocab_size: rows of its embedding.
        generate: lets it write text itself; None where it cannot.
        together: texts that it writes side by side.
    """

    tokenizer: Any
    vocab_size: int
    generate: Generate | None = None
    together: int = 16


class Source(ABC):
    """A source of calibration samples, as one recipe names it.

    Attributes:
        form: how a recipe writes it, for errors.
        tokenizes: it is text, which needs a tokenizer.
        last: it takes every name that no other kind takes.
        makes_features: it is no text: what models of pictures and sound read, made with the model itself.
    """

    form: ClassVar[str]
    tokenizes: ClassVar[bool] = True
    last: ClassVar[bool] = False
    makes_features: ClassVar[bool] = False

    def __init__(self, spec: CalibrationSpec):
        self.spec = spec

    @property
    def name(self) -> str:
        return self.spec.source

    @property
    def path(self) -> Path:
        """Of sources that are files."""
        return Path(self.name).expanduser()

    @classmethod
    @abstractmethod
    def takes(cls, name: str) -> bool:
        """Whether a name is one of this kind."""

    def check(self) -> None:  # noqa: B027  some are always there
        """Raises InputError where it cannot be had, before the work begins; as little as possible is read."""

    @abstractmethod
    def samples(self, model: Model) -> Samples:
        """The samples.

        Raises:
            InputError: it cannot be had, or holds no samples.
        """

    def features(self, module: torch.nn.Module | None, drawn: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """What a model that reads no text is calibrated on, and what it is, for reports.

        Args:
            module: the model; None where it is not in memory as a whole.
            drawn: random numbers in the sizes of its inputs, by their names.

        Raises:
            InputError: it cannot be had of this model.
        """
        raise InputError(f"{self.name} is for models that read text", place="calibration")

    def asked_for(self, found: int) -> str:
        """The end of a description where there are fewer samples than the recipe asks for."""
        return "" if found == self.spec.samples else f", {self.spec.samples} asked for"


S = TypeVar("S", bound=type[Source])
_KINDS: list[type[Source]] = []


def source(cls: S) -> S:
    """Register a kind of source."""
    _KINDS.append(cls)
    return cls


def source_of(spec: CalibrationSpec) -> Source:
    """The source that a recipe names."""
    import_folder(f"{__package__}.kinds")
    import_plugins(ENTRY_POINTS, "calibration sources")
    return next(kind for kind in sorted(_KINDS, key=lambda k: k.last) if kind.takes(spec.source))(spec)


def forms() -> str:
    """How sources are written, in a sentence."""
    *others, end = [kind.form for kind in sorted(_KINDS, key=lambda k: (k.last, k.form))]
    return f"Sources are {', '.join(others)} and {end}"


def needed(tokenizer: Any, what: str) -> Any:
    """A tokenizer that text needs.

    Raises:
        InputError: there is none.
    """
    if tokenizer is None:
        raise InputError("text needs a tokenizer", place=what, remedy='Give one, token ids, or source "random"')
    return tokenizer
