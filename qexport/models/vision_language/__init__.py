"""Models that read pictures and text together and write text: an architecture is a file in `kinds`."""

from .base import COUNT, FixedPictures, Pictures, VisionLanguage, architecture, in_three_parts, vision_language_of

__all__ = [
    "COUNT", "FixedPictures", "Pictures", "VisionLanguage", "architecture", "in_three_parts", "vision_language_of",
]  # fmt: skip
