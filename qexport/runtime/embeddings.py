"""What stands between token ids and a decoder that reads their embeddings."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnxruntime as ort

from ..artifact.cache_names import EMBEDDINGS, is_past
from .values import value_of


class Embeds(Protocol):
    """Makes of token ids what a decoder reads in their place.

    Attributes:
        makes: names of the decoder's inputs that it makes.
    """

    makes: frozenset[str]

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> Mapping[str, ort.OrtValue]:
        """Inputs by name.

        Args:
            ids: int64 [batch, sequence], the new tokens.
            positions: of the same shape, their places in the text, padding not counted.
        """
        ...


class StandIn:
    """Numbers in the place of embeddings, the same for the same token: for a file that is to run, whatever it says.

    Args:
        session: on a decoder.
    """

    def __init__(self, session: ort.InferenceSession):
        self._inputs = {
            value.name: value for value in session.get_inputs()
            if value.name not in ("attention_mask", "position_ids") and not is_past(value.name)
        }  # fmt: skip
        self.makes = frozenset(self._inputs)

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> Mapping[str, ort.OrtValue]:
        found = {}
        for name, value in self._inputs.items():
            numbers = np.zeros(ids.shape, np.int64)
            if len(value.shape) == 3:
                numbers = np.sin(ids[..., None] * np.arange(1, value.shape[-1] + 1, dtype=np.float32))
            found[name] = value_of(numbers, value.type)
        return found


def reads_embeddings(session: ort.InferenceSession) -> bool:
    """Whether a decoder reads embeddings in the place of token ids."""
    return any(value.name == EMBEDDINGS for value in session.get_inputs())


def stand_in(session: ort.InferenceSession) -> StandIn | None:
    """What a decoder runs on when only its own numbers matter; None for one that reads token ids."""
    return StandIn(session) if reads_embeddings(session) else None
