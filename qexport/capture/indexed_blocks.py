"""An indexer that chooses blocks of tokens: Qwen4.

Transformers goes through rows and queries one by one, as the blocks are of the tokens that each may see. But those of a
row are the same for all its queries, as far as they are full: the first tokens that are no padding, the next ones and
so on. The tokens behind the last full one are read too.
"""

import sys

import torch
from torch import Tensor

from ..graph.ops.attention import MASKED
from .kept import INDEXER
from .recurrences.registry import stands_for_forward
from .summaries import windows


@stands_for_forward("Qwen4ExpTextQSAIndexer")
def _choice(indexer, path, hidden_states, position_embeddings, attention_mask, past_key_values):
    """What takes the place of the indexer's forward: whether a query reads a token, bool [batch, 1, new, total].

    Of every token its key is kept, and how far it is turned: a block's is turned as its first token.
    """
    (cos, sin), width, features = position_embeddings, indexer.compress_ratio, indexer.index_head_dim
    batch, new, _ = hidden_states.shape
    turn = sys.modules[type(indexer).__module__].apply_rotary_pos_emb
    query, key = indexer.index_qk_proj(hidden_states).split([indexer.index_n_heads * features, features], -1)
    query = turn(indexer.q_layernorm(query.reshape(batch, new, -1, features)), cos=cos, sin=sin, unsqueeze_dim=2)
    angles = (part.chunk(2, -1)[0] for part in (cos, sin))
    rows = past_key_values.update_rows(torch.cat([key, *angles], -1), indexer.layer_idx, INDEXER)

    seen = attention_mask[:, 0] == 0
    real = seen[:, -1].float()  # to the last query all tokens are visible that are no padding
    blocks = _blocks(rows, real, width)
    keys = indexer.k_layernorm(blocks[..., :features].mean(2))[:, :, None]
    cos, sin = (torch.cat([part, part], -1) for part in blocks[:, :, 0, features:].chunk(2, -1))
    keys = turn(keys, cos=cos, sin=sin, unsqueeze_dim=2)[:, :, 0]
    scores = torch.relu(query @ keys.transpose(1, 2)[:, None]).sum(2) / features**0.5

    full = torch.div(seen.long().sum(-1, keepdim=True), width, rounding_mode="floor")
    number = torch.arange(blocks.shape[1])
    places = torch.ops.qexport.highest(torch.where(number < full, scores, MASKED), indexer.block_topk)
    chosen = (torch.zeros_like(scores).scatter(-1, places, 1.0) > 0) & (number < full)
    read = torch.where(chosen | (number == full), 1.0, 0.0)
    of_token = torch.div((real.cumsum(-1) - 1).clamp(min=0), width, rounding_mode="floor").long()
    return read.gather(-1, of_token[:, None].expand(-1, new, -1))[:, None] > 0


def _blocks(rows: Tensor, real: Tensor, width: int) -> Tensor:
    """Rows [batch, total, features] of real tokens in blocks of `width`, [batch, blocks, width, features].

    Behind them are rows of padding, and of nothing: so there are more blocks than full ones.
    """
    order = real.sort(dim=-1, descending=True, stable=True).indices[..., None]
    return windows(rows.gather(1, order.expand(-1, -1, rows.shape[-1])), width)
