"""Models that find points in pictures, up to the maps from which the points are chosen.

How many points a picture has is a value, and no size that a graph could have. Behind the file remain a threshold, the
borders and the best so many: a few lines of NumPy, or transformers' own functions.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForKeypointDetection, PretrainedConfig, PreTrainedModel


def with_maps(model: PreTrainedModel) -> PreTrainedModel:
    """The model (SuperPoint), whose forward returns maps; it is changed in place.

    They are scores [batch, height, width], 0 where a neighbour within the config's nms_radius has more, and descriptors
    of length 1 [batch, features, height / 8, width / 8].
    """
    kind = type(model)

    def forward(self, pixel_values: Tensor, **_options: Any) -> dict[str, Tensor]:
        seen = self.encoder(self.extract_one_channel_pixel_values(pixel_values))[0]
        describes = self.descriptor_decoder
        described = describes.conv_descriptor_b(describes.relu(describes.conv_descriptor_a(seen)))
        return {
            "scores": self.keypoint_decoder._get_pixel_scores(seen),
            "descriptors": torch.nn.functional.normalize(described, p=2, dim=1),
        }

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


class Maps:
    """Loads models as `AutoModelForKeypointDetection` does, and ends them where points are chosen."""

    __name__ = AutoModelForKeypointDetection.__name__

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        return with_maps(AutoModelForKeypointDetection.from_config(config, **options))

    def from_pretrained(self, path: Path, **options: Any) -> Any:
        made = AutoModelForKeypointDetection.from_pretrained(path, **options)
        if not options.get("output_loading_info"):
            return with_maps(made)
        model, info = made
        return with_maps(model), info
