"""Attention whose queries and result are made by experts: JetMoe (arXiv 2404.07413).

Its code takes tokens apart by the expert that they chose, in pieces whose sizes depend on values. Here every expert
computes every token, and what it makes for a query counts if that query is its own.
"""

import sys

import torch
from torch.nn.functional import linear
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import IMPLEMENTATION
from .experts import sum_of_experts
from .recurrences.registry import stands_for_forward


@stands_for_forward("JetMoeTopKGating")
def _router(router, path, hidden_states):
    """What takes the place of the router's forward: the experts that each token chose, and their weights."""
    scores, places = router.layer(hidden_states).float().topk(router.top_k, dim=-1)
    return places, torch.softmax(scores, dim=-1)


@stands_for_forward("JetMoeMoE")
def _mixture(mixture, path, hidden_states):
    """What takes the place of the forward of the mixture behind attention."""
    places, weights = mixture.router(hidden_states.reshape(-1, hidden_states.shape[-1]))
    shares = torch.ops.qexport.expert_shares(places, weights, mixture.router.num_experts)

    def expert(number: int, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x, mixture.input_linear.weight[number]).chunk(2, dim=-1)
        return linear(mixture.activation(gate) * up * share, mixture.output_linear.weight[number])

    return sum_of_experts(expert, hidden_states, shares.view(*hidden_states.shape[:-1], -1)) + mixture.bias


@stands_for_forward("JetMoeParallelExperts")
def _of_queries(experts, path, x, shares):
    """What takes the place of the forward of one linear of each expert of the attention.

    Args:
        x: [batch, sequence, features], for a result for each of the queries of a token; [batch, sequence, queries,
            features], for one result of them all.
        shares: what each query gives every expert, [batch, sequence, queries, experts].
    """

    def expert(number: int, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        weight = experts.weight[number]
        return linear((x * share).sum(2), weight) if x.dim() == 4 else linear(x, weight)[:, :, None] * share

    return sum_of_experts(expert, x, shares)


@stands_for_forward("JetMoeAttention")
def _attention(
    layer, path, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **kwargs
):  # fmt: skip
    """What takes the place of the attention's forward.

    Queries that read the same head of keys stand side by side, as in grouped attention.
    """
    experts, shape, width = layer.experts, hidden_states.shape[:-1], layer.head_dim
    places, weights = experts.router(hidden_states)
    chosen = (places[..., None] == torch.arange(experts.num_experts)).float()
    query = experts.input_linear(hidden_states, chosen).view(*shape, layer.top_k, -1, width).transpose(2, 3)
    key, value = (x.view(*shape, -1, width).transpose(1, 2) for x in layer.kv_proj(hidden_states).chunk(2, dim=-1))
    turn = sys.modules[type(layer).__module__].apply_rotary_pos_emb
    query, key = turn(query.reshape(*shape, -1, width).transpose(1, 2), key, *position_embeddings)
    key, value = past_key_values.update(key, value, layer.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    result, _ = attend(layer, query, key, value, attention_mask, scaling=layer.scaling, **kwargs)
    result = result.view(*shape, -1, layer.top_k, width).transpose(2, 3).reshape(*shape, layer.top_k, -1)
    return experts.output_linear(result, chosen * weights[..., None]) + experts.bias, None, None
