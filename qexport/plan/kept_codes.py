"""What becomes of the codes that a checkpoint holds, in words."""

from collections.abc import Sequence

from .linear_plan import LinearPlan

AS_STORED = "as stored"


def kept_codes(method: str, plan: Sequence[LinearPlan]) -> str:
    """A sentence on all linears whose codes are given; empty where there are none.

    Args:
        method: that made the codes, with its sizes.
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
    return f"the checkpoint holds codes ({method}): {', '.join(more)}"
