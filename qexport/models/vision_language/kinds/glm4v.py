"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: pictures of any size, rows joined by a convolution."""

from ..base import architecture
from ..grids import GridPictures


@architecture
class GLM4V(GridPictures):
    """GLM-4.1V and those made like it, with experts and without."""

    types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    marks = "image"
