"""xLSTM's memory of keys and values, and the model around it, which keeps it in a cache of its own class."""

import re
import sys

import torch

from ..attention import current_cache
from .registry import stands_for_forward


@stands_for_forward("xLSTMBackend")
def memory(backend, path, query, key, value, igate, fgate, **kwargs):
    """With the arguments and results of transformers' forward, but for the states, which go into the cache."""
    layer, cache = int(re.findall(r"\.(\d+)\.", path)[-1]), current_cache()
    query, key, value, igate, fgate = (x.transpose(1, 2) for x in (query, key, value, igate, fgate))
    past = cache.get_recurrent_state(layer)
    if past is None:
        batch, _, heads, width = key.shape
        past = value.new_zeros((batch, heads, width, value.shape[3] + 2))
    scale, eps = float(key.shape[-1] ** -0.5), float(backend.config.eps)
    out, state = torch.ops.qexport.matrix_lstm(query, key, value, igate, fgate, past, scale, eps)
    cache.update_recurrent_state(state, layer)
    return out.transpose(1, 2), None


@stands_for_forward("xLSTMModel")
def blocks(model, path, input_ids=None, inputs_embeds=None, **kwargs):
    """All tokens at once, whatever their number."""
    x = model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    for block in model.blocks:
        x, _ = block(x)
    return sys.modules[type(model).__module__].xLSTMOutput(last_hidden_state=model.out_norm(x))
