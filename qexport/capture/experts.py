"""Mixtures of experts as plain linears: every expert on every token, times the share that the router gives it.

Transformers runs an expert on the tokens that chose it, in a loop or in a grouped product whose sizes depend on data. A
token's share of an expert that it did not choose is zero, so the sum over all experts is the same. Passes see linears
like any others; lower/fuse_moe.py puts the whole into one kernel where it can.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import CaptureError
from ..graph.ops import experts as _ops  # noqa: F401  registers the operator

IMPLEMENTATION = "qexport"
_TRACED = 4  # of the experts of a layer; see expert_copies.py
_rows: ContextVar[tuple[int, int] | None] = ContextVar("rows", default=None)


@contextmanager
def tokens_of(ids: torch.Tensor):
    """Name the token ids [batch, sequence] that experts inside the `with` work on: they are handed one flat row."""
    batch, sequence = ids.shape
    token = _rows.set((batch, sequence))
    try:
        yield
    finally:
        _rows.reset(token)


def _dense(experts, hidden_states, top_k_index, top_k_weights):
    """What transformers calls instead of an experts module's forward.

    Args:
        hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, chosen].
    """
    rows = _rows.get()
    if rows is None or hidden_states.dim() != 2 or top_k_index.shape != top_k_weights.shape:
        raise CaptureError("experts of a form that cannot be lowered", place=type(experts).__name__)
    x = hidden_states.view(*rows, hidden_states.shape[-1])
    shares = torch.ops.qexport.expert_shares(top_k_index, top_k_weights, experts.num_experts)
    total = sum_of_experts(partial(_expert, experts), x, shares.view(*rows, experts.num_experts))
    return total.view(-1, hidden_states.shape[-1])


def sum_of_experts(expert: Callable[..., torch.Tensor], x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """What all experts make of x [batch, sequence, hidden]; each is called with its number, x and its share."""
    count = shares.shape[-1]
    traced = min(count, _TRACED)
    parts = [expert(number, x, shares[..., number : number + 1]) for number in range(traced)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if traced == count else torch.ops.qexport.more_experts(total, parts[-1], traced, count)


def _expert(experts, number: int, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The result of one expert times its share [batch, sequence, 1]."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)[number]
        bias = getattr(experts, f"{name}_bias")[number] if experts.has_bias else None
        return linear(x, weight.t() if experts.is_transposed else weight, bias)

    inner = project("gate_up_proj", x) if experts.has_gate else project("up_proj", x)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    if experts.has_bias or experts.has_post_expert_norm:
        out = project("down_proj", inner)
        return (experts.post_expert_norm(out) if experts.has_post_expert_norm else out) * share
    # In front of the product, so that statistics of its input count the tokens that chose the expert.
    return project("down_proj", inner * share)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dense)
