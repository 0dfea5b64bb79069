"""The float dtypes of exports by PyTorch's name for them; see `artifact.dtypes`."""

import torch

from ..artifact.dtypes import FLOATS, FloatType

FLOAT_TYPES: dict[torch.dtype, FloatType] = {getattr(torch, name): kind for name, kind in FLOATS.items()}
