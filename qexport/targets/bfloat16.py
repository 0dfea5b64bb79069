"""What ONNX Runtime's CUDA provider has no bfloat16 kernels for, though it has float16 ones.

QuantizeLinear and DequantizeLinear take no bfloat16 scales, which rules out quantized inputs, and weights whose product
is made of a DequantizeLinear when the file is loaded. MatMulNBits with fpA_intB, MatMulBnb4, GatherBlockQuantized and
GroupQueryAttention, with a cache of codes too, have them. Other operators compute in float32, casts around them.
"""

from collections.abc import Iterable

import torch

from ..errors import InputError
from ..plan.linear_plan import LinearPlan
from ..quant.formats import Scheme

aten = torch.ops.aten


def check_bfloat16(plan: Iterable[LinearPlan], int8_factors: bool) -> None:
    """Refuse what cannot run in bfloat16.

    Args:
        plan: the decision for every linear.
        int8_factors: whether quantized linears get low-rank branches of int8 factors.

    Raises:
        InputError: names the first linear and what it lacks.
    """
    for linear in plan:
        if linear.scheme is None:
            continue
        why, remedy = _lacking(linear.scheme)
        if not why and int8_factors:
            why, remedy = "int8 factors of lorc have one scale per column", "set lorc to factors: float"
        if why:
            raise InputError(
                f"{linear.scheme.name} has no bfloat16 kernel in ONNX Runtime: {why}", place=linear.name,
                remedy=f"Take dtype float16, or {remedy}",
            )  # fmt: skip


def _lacking(scheme: Scheme) -> tuple[str, str]:
    """What a scheme needs that there is none of, and what to take instead; empty where nothing is missing."""
    if scheme.activation is not None:
        return "inputs are quantized", "a scheme with float inputs, such as w4a16_g32"
    if scheme.weight.group_size <= 0:
        return "weights have no groups", "a scheme with groups, such as w4a16_g32"
    return "", ""
