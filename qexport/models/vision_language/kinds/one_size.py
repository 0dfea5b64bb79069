"""Those that read pictures, or tiles of them, of one size, and whose rows are all that transformers makes of them."""

from ..base import FixedPictures, architecture


@architecture
class OneSize(FixedPictures):
    """InternVL 3 in transformers' own form, Aya Vision, Command A Vision, GOT-OCR 2, ViP-LLaVA."""

    types = ("internvl", "aya_vision", "cohere2_vision", "got_ocr2", "vipllava")
