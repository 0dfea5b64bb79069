"""InternVL: a vision transformer whose rows are joined by fours, two linears, and any decoder."""

from ..base import FixedPictures, architecture


@architecture
class InternVL(FixedPictures):
    """InternVL 3 in transformers' own form."""

    types = ("internvl",)
