"""What becomes of the codes that a checkpoint holds, in words."""

from collections.abc import Sequence

import torch

from .linear_plan import LinearPlan

AS_STORED = "as stored"


def kept_codes(method: str, plan: Sequence[LinearPlan], dtype: torch.dtype) -> str:
    """A sentence on all linears whose codes are given; empty where there are none.

    Args:
        method: that made the codes, with its sizes.
        dtype: of what stays float in the file, the scales of products with float inputs too.
    """
    given = [p for p in plan if p.given is not None]
    if not given:
        return ""
    kept = [p for p in given if p.scheme is not None]
    same = sum(p.reason.startswith(AS_STORED) for p in kept)
    more = [f"{len(kept)} of {len(plan)} linears keep them"]
    if same < len(kept):
        more.append(f"{same} {AS_STORED} and {len(kept) - same} in another form without a change of value")
    if len(kept) < len(given):
        more.append(f"{len(given) - len(kept)} become float")
    if rounded := sum(not _holds(dtype, p) for p in kept):
        more.append(f"the scales of {rounded} are rounded to {str(dtype).removeprefix('torch.')}")
    return f"the checkpoint holds codes ({method}): {', '.join(more)}"


def _holds(dtype: torch.dtype, plan: LinearPlan) -> bool:
    """Whether a file in this dtype has the very scales of the checkpoint: those of integer products are float32."""
    if plan.given is None or plan.chosen.integer:
        return True
    return plan.given.weight.scale_dtype in _HELD[dtype]


_HELD = {  # dtypes of safetensors, every number of which a dtype has
    torch.float32: ("F32", "F16", "BF16"), torch.float16: ("F16",), torch.bfloat16: ("BF16",),
}  # fmt: skip
