"""Matrix products, norms, attention and rotary embedding."""

import torch
from torch.fx import Node

from ...ops.attention import MASKED
from ...passes.edit import dtype_of, shape_of
from ..emitter import ONNX_DTYPE, Emitter, unsupported

aten = torch.ops.aten
ops = torch.ops.qexport
_END = 2**63 - 1


def _linear(emit: Emitter, node: Node):
    x, weight, bias = (*node.args, None)[:3]
    name = weight.target.rpartition(".")[0]
    output = f"{name}.output" if bias is None else ""
    if weight.op == "get_attr" and weight.target not in emit.initializers:
        product = emit.op("MatMul", emit.get(x), emit.tensor(weight, transpose=True), name=name, output=output)
    else:
        # Shared with an embedding. A Transpose in front of the product would be a second copy, made at every load, and
        # ONNX Runtime makes none above 2 GB.
        product = emit.op(
            "FusedMatMul", emit.get(x), emit.get(weight), domain="com.microsoft", name=name, output=output, transB=1
        )
    return product if bias is None else emit.op("Add", product, emit.get(bias), output=f"{name}.output")


def _matmul(emit: Emitter, node: Node):
    name = node.meta.get("linear", "")
    output = f"{name}.output" if name and "result_of" in node.meta else ""
    return emit.op("MatMul", emit.get(node.args[0]), emit.get(node.args[1]), name=name, output=output)


def _addmm(emit: Emitter, node: Node):
    bias, x, weight = node.args
    return emit.op("Add", emit.op("MatMul", emit.get(x), emit.get(weight)), emit.get(bias))


def _baddbmm(emit: Emitter, node: Node):
    """beta * input + alpha * (x @ y)."""
    dtype, given = dtype_of(node), node.kwargs
    start, product = emit.get(node.args[0], dtype), emit.op("MatMul", emit.get(node.args[1]), emit.get(node.args[2]))
    if (alpha := given.get("alpha", 1)) != 1:
        product = emit.op("Mul", product, emit.constant(float(alpha), dtype))
    if (beta := given.get("beta", 1)) != 1:
        start = emit.op("Mul", start, emit.constant(float(beta), dtype))
    return emit.op("Add", start, product)


def _gain(emit: Emitter, node: Node, weight: Node | None):
    """A norm's gain; ones where it has none, as ONNX wants one."""
    return emit.constant(torch.ones(node.args[1]).tolist(), dtype_of(node)) if weight is None else emit.get(weight)


def _rms_norm(emit: Emitter, node: Node):
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if len(shape) != 1:
        raise unsupported(node, "over several axes")
    gain = _gain(emit, node, weight)
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return emit.op("RMSNormalization", emit.get(x), gain, axis=-1, epsilon=eps, stash_type=1)


def _layer_norm(emit: Emitter, node: Node):
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    return emit.op(
        "LayerNormalization",
        emit.get(x),
        _gain(emit, node, weight),
        emit.get(bias),
        axis=-len(shape),
        epsilon=float(eps),
    )


def _causal_mask(emit: Emitter, node: Node):
    """Positions are counted by a CumSum over ones: comparing with a length read from a shape would move the comparison
    to the CPU and its result back under the CUDA provider."""
    attention_mask, past_length, window = node.args
    real = emit.get(attention_mask, torch.bool)
    ones = emit.op("Cast", emit.op("Or", real, emit.op("Not", real)), to=ONNX_DTYPE[torch.int64])
    key = emit.op("CumSum", ones, emit.constant(1))
    query = emit.op("Slice", key, emit.shape([past_length]), emit.constant([_END]), emit.constant([1]))
    key = emit.op("Unsqueeze", key, emit.constant([1, 2]))
    query = emit.op("Unsqueeze", query, emit.constant([1, 3]))
    visible = emit.op("LessOrEqual", key, query)
    if window:
        visible = emit.op("And", visible, emit.op("Greater", key, emit.op("Sub", query, emit.constant(window))))
    visible = emit.op("And", visible, emit.op("Unsqueeze", real, emit.constant([1, 2])))
    return emit.op("Where", visible, emit.constant(0.0, dtype_of(node)), emit.constant(MASKED, dtype_of(node)))


def _cached_attention(emit: Emitter, node: Node):
    query, key, value, past_key, past_value, mask, scale, softcap = node.args
    out, *present = emit.op(
        "Attention", *(emit.get(a) for a in (query, key, value, mask, past_key, past_value)),
        scale=float(scale), softcap=float(softcap) or None, outputs=3,
    )  # fmt: skip
    return emit.op("Transpose", out, perm=[0, 2, 1, 3]), *present


def _attention(emit: Emitter, node: Node):
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p", 0.0):
        raise unsupported(node, "with dropout")
    inputs = [emit.get(given.get(name)) for name in names[:4]]
    scale = given.get("scale")
    return emit.op(
        "Attention",
        *inputs,
        is_causal=int(given.get("is_causal", False)),
        scale=None if scale is None else float(scale),
    )


def _rotary(emit: Emitter, node: Node):
    x, *tables = node.args
    values = [emit.get(table) for table in tables]
    if shape_of(tables[0])[0] == 1 and shape_of(x)[0] != 1:  # one table for all rows, which the operator wants for each
        rows = emit.op("Shape", emit.get(x), start=0, end=1)
        shape = emit.op("Concat", rows, emit.constant([1, 1]), axis=0)
        values = [emit.op("Expand", value, shape) for value in values]
    return emit.op("RotaryEmbedding", emit.get(x), *values)


TRANSLATIONS = {
    aten.linear.default: _linear, aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.bmm.default: _matmul,
    aten.baddbmm.default: _baddbmm, aten.addmm.default: _addmm,
    aten.rms_norm.default: _rms_norm, aten.layer_norm.default: _layer_norm,
    ops.causal_mask.default: _causal_mask, ops.cached_attention.default: _cached_attention,
    ops.rotary_embedding.default: _rotary, aten.scaled_dot_product_attention.default: _attention,
}  # fmt: skip
