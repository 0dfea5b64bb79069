"""What takes how much of a file, as planned and as written: every byte in one part."""

from collections.abc import Mapping, Sequence

from ..capture.graph import CapturedModel
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import bytes_by_part
from .gqa import GroupedAttention


def planned_bytes(
    captured: CapturedModel,
    plan: Sequence[LinearPlan],
    embeddings: Sequence[EmbeddingPlan],
    float_itemsize: int,
    grouping: GroupedAttention | str | None,
    convolutions: Sequence[ConvolutionPlan] = (),
) -> dict[str, int]:
    """Bytes of the tensors of an export before it is made, as `bytes_by_part` has them, with tables of positions.

    Args:
        float_itemsize: bytes of a number that stays float; grouping: see `plan_attention`.
    """
    tables = sum(t.numel() for t in grouping.tables.values()) if isinstance(grouping, GroupedAttention) else 0
    parts = bytes_by_part(captured, plan, embeddings, float_itemsize, convolutions)
    return parts | {name: parts[name] + float_itemsize * tables for name in ("rest", "total")}


def by_part(
    total: int,
    tensors: Mapping[str, int],
    linears: Mapping[str, int],
    embeddings: Sequence[EmbeddingPlan],
    projection: tuple[str, str],
) -> dict[str, int]:
    """Sizes by part, which add up to the model.

    Args:
        total: bytes of the files.
        tensors: bytes of every tensor by name.
        linears: bytes of every quantized linear.
        embeddings: the decisions for the tables of token embeddings.
        projection: name of the output projection and of its weight; empty for a model without one.

    Returns:
        model: all of it; embedding: the tables, with what an output projection reads of them too; lm_head: of the
        output projection, without that; quantized_linears: all others; rest.
    """
    name, weight = projection
    embedding = lm_head = 0
    for tensor, size in tensors.items():
        table = next((e for e in embeddings if tensor.startswith(f"{e.name}.")), None)
        copy = table is not None and table.scheme is not None and tensor in (weight, f"{weight}.T")
        if name and (tensor.startswith(f"{name}.") or copy):
            lm_head += size
        elif table is not None:
            embedding += size
    others = sum(size for linear, size in linears.items() if linear != name)
    return {
        "model": total, "quantized_linears": others, "embedding": embedding, "lm_head": lm_head,
        "rest": total - others - embedding - lm_head,
    }  # fmt: skip
