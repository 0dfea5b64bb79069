"""What ONNX Runtime's CUDA provider has no bfloat16 kernels for, though it has float16 ones.

QuantizeLinear and DequantizeLinear take no bfloat16 scales, which rules out quantized inputs, and weights whose product
is made of a DequantizeLinear when the file is loaded. MatMulNBits with fpA_intB, MatMulBnb4, GatherBlockQuantized,
the kernels for floats of 4 and 8 bits and GroupQueryAttention, with a cache of codes too, have them. Others compute
in float32, casts around them.
"""

from collections.abc import Sequence

from ...quant.formats import Scheme


def lacks_bfloat16(scheme: Scheme, ungrouped: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """What a scheme needs that there is no bfloat16 kernel for, and what to take instead; empty where there is one.

    Args:
        ungrouped: of what methods put beside weights, integers with one scale per column, and what to do instead.
    """
    if scheme.activation is not None and not scheme.activation.e4m3:
        why, remedy = "inputs are quantized", "a scheme with float inputs, such as w4a16_g32"
    elif not scheme.weight.own_kernel:
        why, remedy = "weights have no groups", "a scheme with groups, such as w4a16_g32"
    elif ungrouped:
        why, remedy = ungrouped[0]
    else:
        return "", ""
    return f"no bfloat16 kernel in ONNX Runtime: {why}", f"Use dtype float16, or {remedy}"
