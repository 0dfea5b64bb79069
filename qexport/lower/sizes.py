"""What takes how much of a file: every byte in one part."""

from collections.abc import Mapping, Sequence

from ..plan.embedding_plan import EmbeddingPlan


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
