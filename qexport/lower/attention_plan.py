"""Which attention a decoder is deployed with: what a user asks for, what the model allows, what the manifest says."""

from collections.abc import Callable
from typing import Any

import torch

from ..artifact.cache_names import is_past, is_state
from ..capture.graph import CapturedModel
from ..errors import InputError, LoweringError
from ..graph.edit import is_call
from .gqa import GroupedAttention, Unsuited, group_attention, plan_grouping

ATTENTION = ("grouped", "standard")


def check_attention(attention: str) -> None:
    """Raises InputError for anything but "grouped" and "standard"."""
    if attention not in ATTENTION:
        raise InputError(f"unknown attention {attention!r}", remedy=f"Choose {' or '.join(ATTENTION)}")


def plan_attention(
    captured: CapturedModel, attention: str, read: Callable[[str], torch.Tensor], e4m3: bool = False
) -> GroupedAttention | str | None:
    """How the attention of a decoder can be grouped, or why not; None where that is not asked for.

    Args:
        attention: as `export` takes it.
        read: a tensor of the first block.
        e4m3: as `plan_grouping`.
    """
    if attention == "standard" or captured.kind != "decoder":
        return None
    if all(is_state(port.name) for port in captured.inputs if is_past(port.name)):
        return "none of its layers keeps keys and values"
    try:
        return plan_grouping(captured, read, e4m3)
    except Unsuited as why:
        return str(why)


def deploy_attention(captured: CapturedModel, grouping: GroupedAttention | str | None) -> dict[str, Any]:
    """Rewrite a decoder's attention for the runtime, in place; returns what the manifest's settings say of it."""
    if not isinstance(grouping, GroupedAttention):
        nodes = (node for block in captured.blocks for node in block.module.graph.nodes)
        if any(is_call(node, torch.ops.qexport.round_cache.default) for node in nodes):
            raise LoweringError(
                f"a cache of codes needs grouped attention, but it is standard here: {grouping or 'as asked for'}",
                place="attention", remedy="Use grouped attention, or leave the cache in float",
            )  # fmt: skip
        return {"attention": "standard", **({"attention_reason": grouping} if grouping else {})}
    group_attention(captured, grouping)
    positions = any(port.name == "position_ids" for port in captured.inputs)
    settings = {"attention": "grouped", "past_present_share_buffer": True, "position_ids": positions}
    bits = max(site.bits for site in grouping.sites)
    numbers = {"kv_cache_numbers": "e4m3"} if any(site.e4m3 for site in grouping.sites) else {}
    return settings | ({"kv_cache_bits": bits} if bits else {}) | numbers
