"""States of layers that are no keys and values, while a model is traced: zeros in front of a text, of a fixed size."""

from collections.abc import Mapping
from contextvars import ContextVar

import torch

from ..errors import CaptureError
from .kept import CONV, RECURRENT, kind_of, state


class GraphStateLayer:
    """The last inputs of a layer's causal convolutions, and the states of its recurrences, as far as it has them.

    The past of a text is zeros, which is what such a convolution is padded with: so a prompt and a step are the same
    graph.

    Args:
        kept: by role what the layer keeps: inputs of a convolution [batch, channels, width], as many as it reads in
            front of its own, and states of recurrences; others are none of its business.
    """

    record_past = False

    def __init__(self, kept: Mapping[str, torch.Tensor]):
        self._past = {role: tensor for role, tensor in kept.items() if kind_of(role) in (CONV, RECURRENT)}
        self._new: dict[str, torch.Tensor] = {}

    def past(self, role: str, number: int = 0) -> torch.Tensor | None:
        """The state of this kind in front of the new tokens; None of a layer that has none."""
        return self._past.get(state(role, number))

    @property
    def present(self) -> list[torch.Tensor] | None:
        """The same behind the new tokens, in order; None before the updates."""
        return [self._new[role] for role in self._past] if self._past.keys() == self._new.keys() else None

    def replace(self, role: str, value: torch.Tensor, number: int = 0) -> torch.Tensor:
        """The state behind the new tokens: of a recurrence, or the last inputs that the model's code takes itself."""
        role = state(role, number)
        if role not in self._past or role in self._new:
            raise CaptureError("one layer updates its state twice")
        self._new[role] = value
        return value

    def update_conv(self, new: torch.Tensor, number: int = 0) -> torch.Tensor:
        """Past and new inputs in a row, [batch, channels, width + new]."""
        past = self.past(CONV, number)
        if past is None:
            raise CaptureError("one layer updates its state twice")
        whole = torch.cat([past, new], dim=-1)
        self.replace(CONV, whole[..., -past.shape[-1] :], number)
        return whole


class Asked:
    """The state that a layer asked its cache for last: some recurrences of transformers are not handed it.

    Attributes:
        state: None in front of a text, while the cache is probed.
    """

    def __init__(self, state: torch.Tensor | None):
        self.state, self._calls = state, 0

    def part(self, rank: int) -> torch.Tensor | None:
        """The state; of one of more axes than `rank`, whose heads are computed one by one, that of the next head."""
        if self.state is None or self.state.dim() == rank:
            return self.state
        self._calls += 1
        return self.state[:, self._calls - 1]


asked: ContextVar[Asked] = ContextVar("asked", default=Asked(None))  # noqa: B039  never changed
