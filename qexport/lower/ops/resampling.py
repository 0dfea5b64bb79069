"""Images and feature maps brought to another size, or looked at in other places."""

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
            if attributes.get("antialias"):  # PyTorch does not align them then
                raise unsupported(node, "has no ONNX form with antialias between aligned corners")
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


translates(aten.upsample_linear1d.vec, aten.upsample_trilinear3d.vec)(_resize("linear"))
translates(
    aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec
)(_resize("nearest", nearest_mode="round_prefer_ceil"))
translates(aten.upsample_bilinear2d.vec)(_resize("linear"))
translates(aten.upsample_bicubic2d.vec)(_resize("cubic", cubic_coeff_a=-0.75))
# PyTorch weighs the pixels that there are; ONNX repeats those at the border, unless told to leave them out.
_AVERAGED: dict[str, Attribute] = {"antialias": 1, "exclude_outside": 1}
translates(aten._upsample_bilinear2d_aa.vec)(_resize("linear", **_AVERAGED))
translates(aten._upsample_bicubic2d_aa.vec)(_resize("cubic", cubic_coeff_a=-0.5, **_AVERAGED))
translates(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)(
    _resize("nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
)


_SAMPLING = ("linear", "nearest", "cubic")
_BEYOND = ("zeros", "border", "reflection")


@translates(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default, aten.grid_sampler.default)
def _grid_sample(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    return emit.op(
        "GridSample", emit.get(given.input), emit.get(given.grid), mode=_SAMPLING[given.interpolation_mode],
        padding_mode=_BEYOND[given.padding_mode], align_corners=int(given.align_corners),
    )  # fmt: skip
