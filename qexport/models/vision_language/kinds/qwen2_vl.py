"""Qwen2-VL: patches of pictures of any size, all of a frame seeing each other."""

from ..base import architecture
from ..grids import GridPictures


@architecture
class Qwen2VL(GridPictures):
    """Qwen2-VL."""

    types = ("qwen2_vl",)
    genai = "qwen2_5_vl"  # which differs in the encoder alone, and that is a file
