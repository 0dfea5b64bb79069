"""Images and feature maps brought to another size."""

import onnx_ir as ir
import torch
from torch.fx import Node

from ...graph.schema import Arguments
from ..emitter import Attribute, Emitter, unsupported
from ..registry import Translation, translates

aten = torch.ops.aten


def _resize(mode: str, **attributes: Attribute) -> Translation:
    def translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
        more = {"coordinate_transformation_mode": "half_pixel", **attributes}
        if getattr(given, "align_corners", False):
            more = {**attributes, "coordinate_transformation_mode": "align_corners"}
        value = emit.get(given.input)
        if given.scale_factors is not None:
            scales = emit.constant([1.0, 1.0, *map(float, given.scale_factors)], torch.float32)
            return emit.op("Resize", value, None, scales, mode=mode, more=more)
        if given.output_size is None:
            raise unsupported(node, "without a size")
        size = emit.op("Shape", value, start=0, end=2)
        wanted = emit.op("Concat", size, emit.shape(list(given.output_size)), axis=0)
        return emit.op("Resize", value, None, None, wanted, mode=mode, more=more)

    return translate


translates(aten.upsample_bilinear2d.vec)(_resize("linear"))
translates(aten.upsample_bicubic2d.vec)(_resize("cubic", cubic_coeff_a=-0.75))
translates(aten.upsample_nearest2d.vec)(
    _resize("nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
)
