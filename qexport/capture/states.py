"""States of layers that are no keys and values, while a model is traced: zeros in front of a text, of a fixed size."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from ..errors import CaptureError

ops = torch.ops.qexport
# Functions of transformers' models that compute the gated delta rule, in chunks and token by token: both are one node.
_DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


class GraphStateLayer:
    """The last inputs of a layer's causal convolution, and the state of its recurrence if it has one.

    The past of a text is zeros, which is what such a convolution is padded with: so a prompt and a step are the same
    graph.

    Attributes:
        past: [batch, channels, width], as many as the convolution reads in front of its own.
        recurrent: the state in front; None without one.
        present: the same behind the new inputs; None before the updates.
    """

    record_past = False

    def __init__(self, past: torch.Tensor, recurrent: torch.Tensor | None = None):
        self.past, self.recurrent = past, recurrent
        self._inputs: torch.Tensor | None = None
        self._state: torch.Tensor | None = None

    @property
    def present(self) -> list[torch.Tensor] | None:
        made = [self._inputs] if self.recurrent is None else [self._inputs, self._state]
        known = [tensor for tensor in made if tensor is not None]
        return known if len(known) == len(made) else None

    def update(self, new: torch.Tensor) -> torch.Tensor:
        """Past and new inputs in a row, [batch, channels, width + new]."""
        if self._inputs is not None:
            raise CaptureError("one layer updates its state twice")
        whole = torch.cat([self.past, new], dim=-1)
        self._inputs = whole[..., -self.past.shape[-1] :]
        return whole

    def update_recurrent(self, state: torch.Tensor) -> torch.Tensor:
        """The state of the recurrence behind the new tokens."""
        if self._state is not None or self.recurrent is None:
            raise CaptureError("one layer updates its state twice")
        self._state = state
        return state


@contextmanager
def recurrences_as_nodes(model: torch.nn.Module) -> Iterator[None]:
    """Inside the `with` the recurrences of a model's code are nodes of the graph, whatever the number of tokens."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    with ExitStack() as stack:
        for file in files:
            for name in _DELTA_RULES:
                if hasattr(file, name):
                    stack.enter_context(patch.object(file, name, _delta_rule))
        yield


def _delta_rule(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **kwargs
):
    """With the arguments and results of transformers' functions."""
    batch, _, heads, width = key.shape
    repeats = value.shape[2] // heads
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    if repeats > 1:
        query, key = (x[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3) for x in (query, key))
    if initial_state is None:
        initial_state = value.new_zeros((batch, value.shape[2], width, value.shape[3]))
    out, state = ops.gated_delta_rule(query, key, value, g, beta, initial_state, float(width**-0.5))
    return out, state if output_final_state else None
