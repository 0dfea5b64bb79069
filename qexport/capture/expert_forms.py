"""Experts whose modules have a form of their own, as sums over all experts; see `experts`."""

import torch
from torch.nn.functional import linear

from .experts import sum_of_experts
from .recurrences.registry import stands_for_forward


@stands_for_forward("Llama4TextMoe")
def _scaled_in_front(mixture, path, hidden_states):
    """What takes the place of the forward of Llama 4's mixture, whose experts read tokens times their share.

    An expert makes nothing of nothing, so all of them on all tokens are the same sum.
    """
    experts, flat = mixture.experts, hidden_states.reshape(-1, hidden_states.shape[-1])
    shares, logits = mixture.router(flat)

    def expert(number: int, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x * share, experts.gate_up_proj[number].t()).chunk(2, dim=-1)
        return linear(up * experts.act_fn(gate), experts.down_proj[number].t())

    total = sum_of_experts(expert, hidden_states, shares.view(*hidden_states.shape[:-1], -1))
    return (mixture.shared_expert(hidden_states) + total).view(flat.shape), logits


@stands_for_forward("DbrxExperts")
def _stacked(experts, path, hidden_states, top_k_index, top_k_weights):
    """What takes the place of the forward of DBRX's experts, whose weights lie one below another."""
    shares = torch.ops.qexport.expert_shares(top_k_index, top_k_weights, experts.num_experts)
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    gates, ups, downs = (weight.view(shape) for weight in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2))

    def expert(number: int, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        inner = experts.mlp.activation_fn(linear(x, gates[number])) * linear(x, ups[number])
        return linear(inner * share, downs[number].t())

    return sum_of_experts(expert, hidden_states, shares.view(*hidden_states.shape[:-1], -1))


@stands_for_forward("LongcatFlashMoE")
def _beside_nothing(mixture, path, hidden_states):
    """What takes the place of the forward of LongCat's mixture, some of whose experts hand on what they read."""
    experts = mixture.experts
    _, weights, index = mixture.router(hidden_states)
    shares = torch.ops.qexport.expert_shares(index, weights, experts.total_experts)
    shares = shares.view(*hidden_states.shape[:-1], -1)
    idle = shares[..., experts.num_routed_experts :].sum(-1, keepdim=True)

    def expert(number: int, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x, experts.gate_up_proj[number]).chunk(2, dim=-1)
        return linear(experts.act_fn(gate) * up * share, experts.down_proj[number])

    return sum_of_experts(expert, hidden_states, shares[..., : experts.num_routed_experts]) + hidden_states * idle
