"""What an architecture that reads pictures and text together says of itself, so that it becomes three files.

All of them have the same three parts: an encoder that makes rows of features of pictures, a table of token embeddings
in which these rows take the places of a token that stands for them, and a decoder that reads the result. What differs
is what the encoder reads, how many rows it makes, and what else the decoder reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from ...plugins import import_folder, import_plugins

# Packages that bring architectures name their modules under this group.
ENTRY_POINTS = "qexport.vision_language"
COUNT = "num_images"  # what the number of pictures is called in a file

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Pictures:
    """One input of an encoder of pictures.

    Attributes:
        dims: an int, or the name of a dimension that is free, for each axis.
        dtype: of its values.
    """

    dims: Dims
    dtype: torch.dtype = torch.float32


def uneven_sides(count: int, unit: int) -> Tensor:
    """Heights and widths of so many pictures: two by three units, three by two and so on; int64 [pictures, 2]."""
    return torch.tensor([[unit * (2 + i % 2), unit * (3 - i % 2)] for i in range(count)])


class VisionLanguage(ABC):
    """An architecture; what most of them have in common is here.

    Attributes:
        types: what configs call such models (model_type).
        decoder: module path of what reads merged embeddings.
        positions: dimensions of the decoder's position_ids.
        genai: what onnxruntime-genai calls such a model; None where it runs none.
    """

    types: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str] = "model.language_model"
    positions: ClassVar[Dims] = ("batch_size", "sequence_length")
    genai: ClassVar[str | None] = None
    loader: ClassVar[Any] = AutoModelForImageTextToText

    @abstractmethod
    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        """What the encoder reads, by the names that the model's processor gives it."""

    @abstractmethod
    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """So many pictures of random numbers as the encoder reads them, by the names of its inputs."""

    def features(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        """What the encoder makes of pictures: a row for each token that stands for them, float32 [rows, hidden].

        It is traced, so that sizes may not depend on values.
        """
        return self.stated(model, pictures)

    def given(self, pictures: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """The pictures of so many prompts as transformers' forward reads them."""
        return dict(pictures)

    def stated(self, model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> Tensor:
        """The same as transformers makes it, for a witness."""
        made = model.model.get_image_features(**pictures).pooler_output
        if isinstance(made, Tensor):
            return made.reshape(-1, made.shape[-1])
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in made])

    def rows(self, config: PretrainedConfig, pictures: Mapping[str, Tensor], total: int) -> list[int]:
        """How many of the rows are each picture's; all alike where the architecture does not say otherwise.

        Args:
            total: rows of them all.
        """
        count = len(next(iter(pictures.values())))
        return [total // count] * count

    def token(self, config: PretrainedConfig) -> int:
        """The id of the token that stands for a row."""
        return int(config.image_token_id)

    def placeholder(self, config: PretrainedConfig, rows: int) -> list[int]:
        """The tokens that stand for a picture of so many rows, with what belongs around them."""
        return [self.token(config)] * rows

    def reserved(self, config: PretrainedConfig) -> frozenset[int]:
        """Tokens that are no words."""
        return frozenset(self.placeholder(config, 1))

    def places(self, config: PretrainedConfig, ids: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        """The decoder's position_ids for prompts, int64 [batch, sequence], about pictures: their places in the text."""
        return torch.arange(ids.shape[1]).expand(len(ids), -1).contiguous()

    def others(self, config: PretrainedConfig) -> dict[str, tuple[Dims, torch.dtype]]:
        """What else the decoder reads: dimensions and dtype by name."""
        return {}

    def beside(self, config: PretrainedConfig, ids: Tensor) -> dict[str, Tensor]:
        """What transformers' forward reads beside a prompt of token ids [batch, sequence] and its pictures, by name."""
        return {}

    def besides(self, model: PreTrainedModel, ids: Tensor, there: Tensor, rest: Tensor) -> dict[str, Tensor]:
        """`others` as the embedding makes them; it is traced.

        Args:
            ids: int64 [batch, sequence].
            there: bool [batch, sequence], tokens that stand for rows of features.
            rest: [batch, sequence, n], what these rows have behind the embedding, and zeros for text.
        """
        return {}

    def seen_besides(self, config: PretrainedConfig, ids: Tensor, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        """`others` for token ids [batch, sequence] as transformers' decoder got them.

        Args:
            seen: what it was called with, by name.
        """
        return {}

    def written(self, config: PretrainedConfig, ids: Tensor, made: Mapping[str, Any] | None = None) -> Tensor:
        """Which tokens are written about pictures, and no prompt: those behind the last of a picture.

        Args:
            ids: [batch, sequence].
            made: what the model's processor made with them, by name.

        Returns:
            bool [batch, sequence].
        """
        return (ids == self.token(config)).flip(1).cumsum(1).flip(1) == 0

    def told(self, config: PretrainedConfig, written: Tensor) -> dict[str, Tensor]:
        """Those of `others` that only who runs the decoder can say.

        Args:
            written: bool [batch, sequence], tokens that are written, and no prompt.
        """
        return {}

    def texts(self, text: str, stand: str) -> dict[str, list[str]]:
        """What the model's processor is to read of a text about pictures, by the names of its arguments.

        Args:
            stand: what stands in it for a picture.
        """
        return {"text": [text]}

    def settings(self, config: PretrainedConfig) -> dict[str, Any]:
        """What a runtime has to know of it besides the token, as plain types."""
        return {}

    def decode(self, model: PreTrainedModel, given: Mapping[str, Any]) -> Any:
        """Run the decoder with its output projection on what it reads, by name."""
        return model(**given)


class FixedPictures(VisionLanguage):
    """An architecture whose encoder reads pictures of one size, [pictures, channels, height, width]."""

    def side(self, config: PretrainedConfig) -> tuple[int, int]:
        """Height and width of a picture."""
        size = config.vision_config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def inputs(self, config: PretrainedConfig) -> dict[str, Pictures]:
        channels = getattr(config.vision_config, "num_channels", 3)
        return {"pixel_values": Pictures((COUNT, channels, *self.side(config)))}

    def example(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        _, *sizes = self.inputs(config)["pixel_values"].dims
        return {"pixel_values": torch.randn(count, *map(int, sizes), generator=generator)}


_WRITES = "ForConditionalGeneration"  # how classes of whole models are called


def in_three_parts(config: PretrainedConfig) -> bool:
    """Whether it is a model of pictures and text with its output projection, of an architecture that is known."""
    named = config.architectures or ()
    return any(name.endswith(_WRITES) for name in named) and vision_language_of(config) is not None


K = TypeVar("K", bound=type[VisionLanguage])
_KINDS: list[type[VisionLanguage]] = []


def architecture(cls: K) -> K:
    """Register an architecture."""
    _KINDS.append(cls)
    return cls


def vision_language_of(config: PretrainedConfig) -> VisionLanguage | None:
    """The architecture of a model; None for one that is no such model, or of a kind that nobody declared."""
    import_folder(f"{__package__}.kinds")
    import_plugins(ENTRY_POINTS, "architectures")
    return next((kind() for kind in _KINDS if config.model_type in kind.types), None)
