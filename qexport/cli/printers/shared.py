"""What the prints of several commands have in common."""

from collections import Counter
from collections.abc import Mapping, Sequence

from ...formatting import megabytes
from ...plan.embedding_plan import EmbeddingPlan


def sizes_by_part(sizes: Mapping[str, int]) -> str:
    head = f", output projection {megabytes(sizes['lm_head'])}" if sizes["lm_head"] else ""
    table = f"embedding {megabytes(sizes['embedding'])}{head}, " if sizes["embedding"] or head else ""
    return f"{table}the rest takes {megabytes(sizes['rest'])}"


def described(plan: EmbeddingPlan) -> str:
    """`model.embed_tokens: w4a16_g32, which lm_head reads too`"""
    scheme = plan.scheme.name if plan.scheme else "float"
    return ", ".join(filter(None, [
        f"{plan.name}: {scheme}", plan.linear and f"which {plan.linear} reads too", plan.reason,
    ]))  # fmt: skip


def print_fast(slow: Sequence[str], indent: str = "") -> None:
    """How many linears have the shape for fpA_intB, and why others have not.

    Args:
        slow: for every linear that becomes MatMulNBits on CUDA the reason; empty where it has the shape.
    """
    if slow:
        reasons = Counter(reason for reason in slow if reason)
        why = "".join(f"; {count}: {reason}" for reason, count in reasons.most_common())
        print(
            f"{indent}fpA_intB, a kernel that the file leaves off, fits {slow.count('')} of {len(slow)} linears{why}"
        )
