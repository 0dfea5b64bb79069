"""Residual sum and norm as the one node that ONNX Runtime has for both; it does not join the two while it loads."""

import onnx_ir as ir

_FUSED = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
SAME_SHAPE = "same_shape"  # on Add nodes: neither side is broadcast


def fuse_normalizations(graph: ir.Graph) -> None:
    """norm(a + b) becomes SkipLayerNormalization(a, b), whose last output is the sum, in place.

    The values keep their names. A sum that several norms read is fused with the first.
    """
    for add in list(graph):
        if add.op_type != "Add" or not add.meta.get(SAME_SHAPE):
            continue
        total = add.outputs[0]
        readers = [use.node for use in total.uses() if use.node.op_type in _FUSED and use.idx == 0]
        norm = next((reader for reader in readers if _over_features(reader)), None)
        if norm is None:
            continue
        made = [ir.Value(name=None) for _ in range(4)]
        fused = ir.node(
            _FUSED[norm.op_type], [*add.inputs, *norm.inputs[1:]], {"epsilon": norm.attributes["epsilon"].as_float()},
            domain="com.microsoft", outputs=made, name=norm.name,
        )  # fmt: skip
        graph.insert_before(add, fused)
        for old, new in ((norm.outputs[0], made[0]), (total, made[3])):
            name, old.name = old.name, None
            new.name, new.shape, new.type = name, old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        for unused in made[1:3]:
            unused.name = ""  # mean and deviation, which training keeps
        graph.remove([norm, add], safe=True)


def _over_features(norm: ir.Node) -> bool:
    """Whether a norm is over the last axis alone, with a gain."""
    constant = all(value is not None and value.const_value is not None for value in norm.inputs[1:])
    return norm.attributes["axis"].as_int() == -1 and constant
