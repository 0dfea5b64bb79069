"""Attention in windows with tokens that see everything, against its definition, key by key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qexport.capture.windowed_attention import windows_as_masks

HEADS, WIDTH = 2, 3
NAMES = ("query", "key", "value", "query_global", "key_global", "value_global")


class Windowed(nn.Module):
    """What Longformer's attention has; its forward must not be called."""

    def __init__(self, window: int):
        super().__init__()
        self.num_heads, self.head_dim, self.one_sided_attn_window_size = HEADS, WIDTH, window
        for name in NAMES:
            setattr(self, name, nn.Linear(4, HEADS * WIDTH).double())

    def forward(self, hidden_states, **masks):
        raise AssertionError("transformers' own")

    def _pad_to_window_size(self, input_ids, attention_mask, pad_token_id):
        raise AssertionError("transformers' own")


def by_definition(module, x, padding, everywhere):
    """Output [batch, sequence, heads * width] of tokens that are no padding, zeros elsewhere."""
    made = {name: getattr(module, name)(x).unflatten(-1, (HEADS, WIDTH)) for name in NAMES}
    found = torch.zeros_like(made["query"])
    for row, head, place in torch.cartesian_prod(*map(torch.arange, found.shape[:3:2] + found.shape[1:2])).tolist():
        if padding[row, place]:
            continue
        far = "_global" if everywhere[row, place] else ""
        seen = [
            other for other in range(x.shape[1]) if not padding[row, other] and (
                far or everywhere[row, other] or abs(place - other) <= module.one_sided_attn_window_size
            )
        ]  # fmt: skip
        keys, values = made[f"key{far}"][row, seen, head], made[f"value{far}"][row, seen, head]
        scores = keys @ made[f"query{far}"][row, place, head] / WIDTH**0.5
        found[row, place, head] = scores.softmax(0) @ values
    return found.flatten(2)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 9), window=st.integers(1, 4), seed=st.integers(0, 99))
def test_it_is_what_the_paper_defines(length, window, seed):
    torch.manual_seed(seed)
    module, x = Windowed(window), torch.randn(2, length, 4, dtype=torch.float64)
    padding = torch.arange(length) >= torch.randint(1, length + 1, (2, 1))
    everywhere = (torch.rand(2, length) < 0.3) & ~padding
    with windows_as_masks(module), torch.no_grad():
        got = module(
            hidden_states=x, attention_mask=None, is_index_masked=padding, is_index_global_attn=everywhere,
            is_global_attn=None, output_attentions=False,
        )  # fmt: skip
        want = by_definition(module, x, padding, everywhere)
    assert len(got) == 1 and torch.allclose(got[0][~padding], want[~padding], atol=1e-12)


def test_no_text_is_padded_and_all_is_as_it_was_behind():
    module = Windowed(2)
    with windows_as_masks(module):
        assert module._pad_to_window_size(input_ids=1, attention_mask=2, pad_token_id=0) == (0, 1, 2)
    with pytest.raises(AssertionError, match="own"):
        module(hidden_states=None)
    with pytest.raises(AssertionError, match="own"):
        module._pad_to_window_size(1, 2, 0)
