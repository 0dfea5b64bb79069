"""Griffin's recurrent block, whose model keeps its states in its modules: RecurrentGemma."""

import re
from unittest.mock import patch

import torch

from .registry import stands_for_forward

ops = torch.ops.qexport


@stands_for_forward("RecurrentGemmaRecurrentBlock")
def recurrent_block(block, path, input_states, position_ids, past_key_values, **kwargs):
    """With the arguments and results of transformers' forward.

    States go into the cache, and a prompt behind a text goes on with them, where transformers' begins with zeros.
    """
    layer = int(re.findall(r"\.(\d+)(?=\.|$)", path)[-1])
    new = block.linear_x(input_states).transpose(1, 2)
    whole = past_key_values.update_conv_state(new, layer, conv_kernel_size=block.conv1d_width)
    x = block.conv_1d(whole)[..., : whole.shape[-1]][..., -new.shape[-1] :]
    past, unit = past_key_values.get_recurrent_state(layer), block.rg_lru

    def scan(hidden_states, recurrent_gate, reset, recurrent_states, **kwargs):
        state = hidden_states.new_zeros(hidden_states.shape[::2]) if past is None else past
        return ops.linear_recurrence(recurrent_gate * ~reset, hidden_states, state)

    with patch.object(unit, "_rnn_scan", scan):
        x = unit(x.transpose(1, 2), position_ids)
    state, unit.recurrent_states = unit.recurrent_states, None
    past_key_values.update_recurrent_state(state, layer)
    return block.linear_out(x * block.act_fn(block.linear_y(input_states))), None
