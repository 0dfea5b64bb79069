"""Images and feature maps brought to another size."""

import torch
from torch.fx import Node

from ..emitter import Emitter, unsupported

aten = torch.ops.aten


def _resize(mode: str, **attributes):
    def translate(emit: Emitter, node: Node):
        x, sizes, *rest = node.args
        align, factors = rest if len(rest) == 2 else (False, *rest)
        if align:
            attributes_of = attributes | {"coordinate_transformation_mode": "align_corners"}
        else:
            attributes_of = {"coordinate_transformation_mode": "half_pixel"} | attributes
        value = emit.get(x)
        if factors is not None:
            scales = emit.constant([1.0, 1.0, *map(float, factors)], torch.float32)
            return emit.op("Resize", value, None, scales, mode=mode, **attributes_of)
        if sizes is None:
            raise unsupported(node, "without a size")
        wanted = emit.op("Concat", emit.op("Shape", value, start=0, end=2), emit.shape(list(sizes)), axis=0)
        return emit.op("Resize", value, None, None, wanted, mode=mode, **attributes_of)

    return translate


TRANSLATIONS = {
    aten.upsample_bilinear2d.vec: _resize("linear"),
    aten.upsample_bicubic2d.vec: _resize("cubic", cubic_coeff_a=-0.75),
    aten.upsample_nearest2d.vec: _resize(
        "nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    ),
}  # fmt: skip
