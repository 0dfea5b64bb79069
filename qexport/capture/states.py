"""States of layers that are no keys and values, while a model is traced: zeros in front of a text, of a fixed size."""

from contextvars import ContextVar

import torch

from ..errors import CaptureError


class GraphStateLayer:
    """The last inputs of a layer's causal convolution, and the state of its recurrence, as far as it has them.

    The past of a text is zeros, which is what such a convolution is padded with: so a prompt and a step are the same
    graph.

    Attributes:
        conv: [batch, channels, width], as many as the convolution reads in front of its own.
        recurrent: the state in front.
    """

    record_past = False

    def __init__(self, conv: torch.Tensor | None = None, recurrent: torch.Tensor | None = None):
        self.conv, self.recurrent = conv, recurrent
        self._inputs: torch.Tensor | None = None
        self._state: torch.Tensor | None = None

    @property
    def present(self) -> list[torch.Tensor] | None:
        """The same behind the new tokens; None before the updates."""
        pairs = [(self.conv, self._inputs), (self.recurrent, self._state)]
        made = [after for before, after in pairs if before is not None]
        return None if any(tensor is None for tensor in made) else [tensor for tensor in made if tensor is not None]

    def update_conv(self, new: torch.Tensor) -> torch.Tensor:
        """Past and new inputs in a row, [batch, channels, width + new]."""
        if self._inputs is not None or self.conv is None:
            raise CaptureError("one layer updates its state twice")
        whole = torch.cat([self.conv, new], dim=-1)
        self._inputs = whole[..., -self.conv.shape[-1] :]
        return whole

    def replace_conv(self, last: torch.Tensor) -> None:
        """The last inputs themselves, where the model's code looks at them without a convolution."""
        if self._inputs is not None or self.conv is None:
            raise CaptureError("one layer updates its state twice")
        self._inputs = last

    def update_recurrent(self, state: torch.Tensor) -> torch.Tensor:
        """The state of the recurrence behind the new tokens."""
        if self._state is not None or self.recurrent is None:
            raise CaptureError("one layer updates its state twice")
        self._state = state
        return state


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
