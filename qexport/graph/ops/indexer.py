"""What an indexer chooses among the keys of a text."""

import torch
from torch import Tensor


@torch.library.custom_op("qexport::highest", mutates_args=())
def highest(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores, from the highest on; of equal ones the first, as in ONNX.

    Args:
        scores: floating point [..., total]; count: how many, or all where there are fewer.

    Returns:
        int64 [..., min(count, total)].
    """
    # torch.topk says of equal ones nothing, and takes these on one machine and those on another.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


@highest.register_fake
def _(scores, count):
    return scores.new_empty((*scores.shape[:-1], torch.sym_min(count, scores.shape[-1])), dtype=torch.int64)
