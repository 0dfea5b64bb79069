"""Matrix products, norms, attention and rotary embedding."""

import math

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.edit import dtype_of, shape_of
from ...graph.meta import Meta
from ...graph.ops.attention import MASKED
from ...graph.schema import Arguments
from ...graph.views import END, size_at
from ..emitter import ONNX_DTYPE, Emitter, unsupported
from ..registry import Translation, translates

aten = torch.ops.aten
ops = torch.ops.qexport


@translates(aten.linear.default)
def _linear(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    x, weight, bias = given.input, given.weight, given.bias
    name = weight.target.rpartition(".")[0] if isinstance(weight.target, str) else ""
    output = f"{name}.output" if name else ""
    inner = output if bias is None else ""
    if weight.op == "get_attr" and weight.target not in emit.initializers:
        product = emit.op("MatMul", emit.get(x), emit.tensor(weight, transpose=True), name=name, output=inner)
    elif not emit.operators.contrib:
        turned = emit.op("Transpose", emit.get(weight), perm=[1, 0])
        product = emit.op("MatMul", emit.get(x), turned, name=name, output=inner)
    else:
        # Shared with an embedding. A Transpose in front of the product would be a second copy, made at every load, and
        # ONNX Runtime makes none above 2 GB.
        product = emit.op(
            "FusedMatMul", emit.get(x), emit.get(weight), domain="com.microsoft", name=name, output=inner, transB=1
        )
    return product if bias is None else emit.op("Add", product, emit.get(bias), output=output)


def _matmul(right: str) -> Translation:
    """A product whose second factor the schema calls `right`."""

    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        name = node.meta.get(Meta.LINEAR, "")
        output = f"{name}.output" if name and Meta.RESULT_OF in node.meta else ""
        return emit.op("MatMul", emit.get(given.self), emit.get(getattr(given, right)), name=name, output=output)

    return translate


translates(aten.matmul.default)(_matmul("other"))
translates(aten.mm.default, aten.bmm.default)(_matmul("mat2"))


@translates(aten.addmm.default)
def _addmm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    product = emit.op("MatMul", emit.get(given.mat1), emit.get(given.mat2))
    if (given.beta, given.alpha) == (1, 1):
        return emit.op("Add", product, emit.get(given.self))
    return _weighted(emit, given, emit.get(given.self), product, dtype_of(node))


@translates(aten.addbmm.default)
def _addbmm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """beta * input + alpha * the sum of all x @ y."""
    product = emit.op("MatMul", emit.get(given.batch1), emit.get(given.batch2))
    total = emit.op("ReduceSum", product, emit.constant([0]), keepdims=0)
    return _weighted(emit, given, emit.get(given.self, dtype_of(node)), total, dtype_of(node))


@translates(aten.baddbmm.default)
def _baddbmm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """beta * input + alpha * (x @ y)."""
    dtype = dtype_of(node)
    start, product = emit.get(given.self, dtype), emit.op("MatMul", emit.get(given.batch1), emit.get(given.batch2))
    return _weighted(emit, given, start, product, dtype)


def _weighted(emit: Emitter, given: Arguments, start: ir.Value, product: ir.Value, dtype: torch.dtype) -> ir.Value:
    if given.alpha != 1:
        product = emit.op("Mul", product, emit.constant(float(given.alpha), dtype))
    if given.beta != 1:
        start = emit.op("Mul", start, emit.constant(float(given.beta), dtype))
    return emit.op("Add", start, product)


@translates(aten._trilinear.default)
def _trilinear(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """The sum of a product of three tensors, each with axes of its own put in."""
    values = []
    for x, axes in ((given.i1, given.expand1), (given.i2, given.expand2), (given.i3, given.expand3)):
        values.append(emit.op("Unsqueeze", emit.get(x), emit.constant(list(axes))) if axes else emit.get(x))
    product = emit.op("Mul", emit.op("Mul", values[0], values[1]), values[2])
    return emit.op("ReduceSum", product, emit.constant(list(given.sumdim)), keepdims=0)


def _gain(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """A norm's gain; ones where it has none, as ONNX wants one."""
    weight: Node | None = given.weight
    if weight is not None:
        return emit.get(weight)
    return emit.constant(torch.ones(given.normalized_shape).tolist(), dtype_of(node))


@translates(aten.rms_norm.default)
def _rms_norm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    gain = _gain(emit, node, given)
    eps = torch.finfo(torch.float32).eps if given.eps is None else float(given.eps)
    axis = -len(given.normalized_shape)
    if not emit.operators.has_transformer_operators:
        return _written_out_norm(emit, node, given, gain, eps)
    return emit.op("RMSNormalization", emit.get(given.input), gain, axis=axis, epsilon=eps, stash_type=1)


def _written_out_norm(emit: Emitter, node: Node, given: Arguments, gain: ir.Value, eps: float) -> ir.Value:
    """In float32 up to the gain, whatever the type; of the operators that ONNX Runtime makes one of."""
    dtype, axes = dtype_of(node), emit.constant(list(range(-len(given.normalized_shape), 0)))
    x = emit.get(given.input, torch.float32)
    mean = emit.op("ReduceMean", emit.op("Pow", x, emit.constant(2.0, torch.float32)), axes, keepdims=1)
    scaled = emit.op("Div", x, emit.op("Sqrt", emit.op("Add", mean, emit.constant(eps, torch.float32))))
    return emit.op("Mul", scaled if dtype == torch.float32 else emit.cast(scaled, dtype), gain)


@translates(aten.layer_norm.default)
def _layer_norm(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op(
        "LayerNormalization", emit.get(given.input), _gain(emit, node, given), emit.get(given.bias),
        axis=-len(given.normalized_shape), epsilon=float(given.eps),
    )  # fmt: skip


@translates(aten.native_layer_norm.default)
def _native_layer_norm(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    return emit.several(
        3, "LayerNormalization", emit.get(given.input), _gain(emit, given.input, given), emit.get(given.bias),
        axis=-len(given.normalized_shape), epsilon=float(given.eps),
    )  # fmt: skip


@translates(ops.causal_mask.default)
def _causal_mask(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """Positions are counted by a CumSum over ones: comparing with a length read from a shape would move the comparison
    to the CPU and its result back under the CUDA provider."""
    real = emit.get(given.attention_mask, torch.bool)
    ones = emit.op("Cast", emit.op("Or", real, emit.op("Not", real)), to=ONNX_DTYPE[torch.int64])
    key = emit.op("CumSum", ones, emit.constant(1))
    query = emit.op("Slice", key, emit.shape([given.past_length]), emit.constant([END]), emit.constant([1]))
    key = emit.op("Unsqueeze", key, emit.constant([1, 2]))
    query = emit.op("Unsqueeze", query, emit.constant([1, 3]))
    visible = emit.op("LessOrEqual", key, query)
    if given.window:
        near = emit.op("Greater", key, emit.op("Sub", query, emit.constant(given.window)))
        visible = emit.op("And", visible, near)
    visible = emit.op("And", visible, emit.op("Unsqueeze", real, emit.constant([1, 2])))
    if given.chunk:
        visible = emit.op("And", visible, _same_chunk(emit, given, real, ones))
    return emit.op("Where", visible, emit.constant(0.0, dtype_of(node)), emit.constant(MASKED, dtype_of(node)))


def _same_chunk(emit: Emitter, given: Arguments, real: ir.Value, ones: ir.Value) -> ir.Value:
    """Whether a query [batch, 1, new, 1] and a key [batch, 1, 1, all] lie in the same chunk of their row.

    Padding in front counts as of the first one: division goes towards zero, and it is hidden anyway.
    """
    counted = emit.op("CumSum", emit.op("Cast", real, to=ONNX_DTYPE[torch.int64]), emit.constant(1))
    lead = emit.op("Cast", emit.op("Equal", counted, emit.constant(0)), to=ONNX_DTYPE[torch.int64])
    leads = emit.op("ReduceSum", lead, emit.constant([1]), keepdims=1)
    places = emit.op("Sub", emit.op("Sub", emit.op("CumSum", ones, emit.constant(1)), emit.constant(1)), leads)
    number = emit.op("Div", places, emit.constant(given.chunk))
    query = emit.op("Slice", number, emit.shape([given.past_length]), emit.constant([END]), emit.constant([1]))
    key = emit.op("Unsqueeze", number, emit.constant([1, 2]))
    return emit.op("Equal", emit.op("Unsqueeze", query, emit.constant([1, 3])), key)


@translates(ops.cached_attention.default)
def _cached_attention(emit: Emitter, node: Node, given: Arguments) -> tuple[ir.Value, ...]:
    if given.sinks is not None or not emit.operators.has_transformer_operators:
        return _written_out_attention(emit, given)
    inputs = (given.query, given.key, given.value, given.mask, given.past_key, given.past_value)
    out, *present = emit.several(
        3, "Attention", *map(emit.get, inputs), scale=float(given.scale), softcap=float(given.softcap) or None
    )
    return emit.op("Transpose", out, perm=[0, 2, 1, 3]), *present


def _written_out_attention(emit: Emitter, given: Arguments) -> tuple[ir.Value, ...]:
    """In plain operators: ONNX's Attention has no sinks, and appeared in opset 23."""
    dtype, heads, size = dtype_of(given.query), size_at(given.query, 1), size_at(given.key, -1)
    pairs = ((given.past_key, given.key), (given.past_value, given.value))
    present = [emit.op("Concat", *map(emit.get, pair), axis=2) for pair in pairs]
    keys, values = (_repeated(emit, x, heads // size_at(given.key, 1), heads, size) for x in present)
    scores = emit.op("MatMul", emit.get(given.query), emit.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = emit.op("Mul", scores, emit.constant(float(given.scale), dtype))
    if given.softcap:
        cap = emit.constant(float(given.softcap), dtype)
        scores = emit.op("Mul", emit.op("Tanh", emit.op("Div", scores, cap)), cap)
    scores = emit.op("Add", scores, emit.get(given.mask, dtype))
    if given.sinks is None:
        out = emit.op("MatMul", emit.op("Softmax", scores, axis=-1), values)
        return emit.op("Transpose", out, perm=[0, 2, 1, 3]), *present
    zero, one, last = (emit.constant([number]) for number in (0, 1, -1))
    column = emit.op("Mul", emit.op("Slice", scores, zero, one, last), emit.constant(0.0, dtype))
    sinks = emit.op("Reshape", emit.get(given.sinks, dtype), emit.constant([1, heads, 1, 1]))
    weights = emit.op("Softmax", emit.op("Concat", scores, emit.op("Add", column, sinks), axis=-1), axis=-1)
    out = emit.op("MatMul", emit.op("Slice", weights, zero, last, last), values)
    return emit.op("Transpose", out, perm=[0, 2, 1, 3]), *present


def _repeated(emit: Emitter, x: ir.Value, times: int, heads: int, size: int) -> ir.Value:
    """[batch, heads / times, tokens, size] with every head several times in a row."""
    if times == 1:
        return x
    wide = emit.op("Unsqueeze", x, emit.constant([2]))
    wide = emit.op("Expand", wide, emit.constant([1, 1, times, 1, 1]))
    return emit.op("Reshape", wide, emit.constant([0, heads, -1, size]))


@translates(aten.scaled_dot_product_attention.default)
def _attention(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    if given.dropout_p:
        raise unsupported(node, "with dropout")
    if not emit.operators.has_transformer_operators:
        return _written_out_product_attention(emit, node, given)
    return emit.op(
        "Attention", *map(emit.get, (given.query, given.key, given.value)), _whole_mask(emit, given),
        is_causal=int(given.is_causal), scale=None if given.scale is None else float(given.scale),
    )  # fmt: skip


def _whole_mask(emit: Emitter, given: Arguments) -> ir.Value | None:
    """A mask with a row for every query: ONNX Runtime's Attention takes none that is the same for all of them."""
    mask = _added_mask(emit, given.attn_mask)
    if mask is None or shape_of(given.attn_mask)[-2] != 1 or shape_of(given.query)[-2] == 1:
        return mask
    queries = emit.op("Shape", emit.get(given.query), start=-2, end=-1)
    ones = [1] * (len(shape_of(given.attn_mask)) - 2)
    parts = [emit.constant(ones)] * bool(ones) + [queries, emit.constant([1])]
    return emit.op("Expand", mask, emit.op("Concat", *parts, axis=0))


def _written_out_product_attention(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    """softmax(scale * q k^T + mask) v in plain operators; a query that sees nothing gets zeros."""
    dtype, size, axes = dtype_of(node), size_at(given.query, -1), len(shape_of(given.key))
    query, key, value = map(emit.get, (given.query, given.key, given.value))
    if axes == 4 and (heads := size_at(given.query, 1)) != (kept := size_at(given.key, 1)):
        key = _repeated(emit, key, heads // kept, heads, size)
        value = _repeated(emit, value, heads // kept, heads, size_at(given.value, -1))
    turned = emit.op("Transpose", key, perm=[*range(axes - 2), axes - 1, axes - 2])
    scale = size**-0.5 if given.scale is None else float(given.scale)
    scores = emit.op("Mul", emit.op("MatMul", query, turned), emit.constant(scale, dtype))
    visible: list[ir.Value] = []
    if given.is_causal:
        one = ir.tensor([1], dtype=ir.DataType.INT64)
        ones = emit.op("ConstantOfShape", emit.op("Shape", scores), more={"value": one})
        visible.append(emit.cast(emit.op("Trilu", ones, upper=0), torch.bool))
    if (mask := _added_mask(emit, given.attn_mask)) is not None:
        if dtype_of(given.attn_mask) == torch.bool:
            visible.append(mask)
        else:
            scores = emit.op("Add", scores, mask)
            visible.append(emit.op("Greater", mask, emit.constant(-math.inf, dtype)))
    for seen in visible:
        scores = emit.op("Where", seen, scores, emit.constant(torch.finfo(dtype).min / 2, dtype))
    weights = emit.op("Softmax", scores, axis=-1)
    for seen in visible:
        weights = emit.op("Where", seen, weights, emit.constant(0.0, dtype))
    return emit.op("MatMul", weights, value)


def _added_mask(emit: Emitter, node: Node | None) -> ir.Value | None:
    """A mask that is added to the scores, or of truth values.

    Where every score of a row is masked with the lowest number of its type, PyTorch gives the mean of the values, as it
    does for any other number, and ONNX Runtime zeros, as both do for -inf. Half the number masks as well.
    """
    if node is None:
        return None
    mask, dtype = emit.get(node), dtype_of(node)
    if not dtype.is_floating_point:
        return mask
    lowest = torch.finfo(dtype).min
    is_lowest = emit.op("Equal", mask, emit.constant(lowest, dtype))
    return emit.op("Where", is_lowest, emit.constant(lowest / 2, dtype), mask)


@translates(ops.rotary_embedding.default)
def _rotary(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    values = [emit.get(given.cos), emit.get(given.sin)]
    # One table for all rows, and the operator wants one for each.
    if shape_of(given.cos)[0] == 1 and shape_of(given.x)[0] != 1:
        rows = emit.op("Shape", emit.get(given.x), start=0, end=1)
        shape = emit.op("Concat", rows, emit.constant([1, 1]), axis=0)
        values = [emit.op("Expand", value, shape) for value in values]
    if not emit.operators.has_transformer_operators:
        return _written_out_rotary(emit, given, values)
    return emit.op("RotaryEmbedding", emit.get(given.x), *values)


def _written_out_rotary(emit: Emitter, given: Arguments, tables: list[ir.Value]) -> ir.Value:
    """The halves (a, b) of every head become (a cos - b sin, b cos + a sin), before opset 23."""
    cos, sin = (emit.op("Unsqueeze", table, emit.constant([1])) for table in tables)
    first, second = emit.several(2, "Split", emit.get(given.x), axis=-1, num_outputs=2)
    halves = (
        emit.op("Sub", emit.op("Mul", first, cos), emit.op("Mul", second, sin)),
        emit.op("Add", emit.op("Mul", second, cos), emit.op("Mul", first, sin)),
    )
    return emit.op("Concat", *halves, axis=-1)
