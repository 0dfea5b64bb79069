"""Qwen3.5: the encoder of Qwen3-VL without features for the first layers; layers of the decoder keep states."""

from transformers import PretrainedConfig

from ..base import architecture
from .qwen3_vl import Qwen3VL


@architecture
class Qwen35(Qwen3VL):
    """Qwen3.5, with and without experts in the decoder."""

    types = ("qwen3_5", "qwen3_5_moe")

    def deep_layers(self, config: PretrainedConfig) -> list[int]:
        return []
