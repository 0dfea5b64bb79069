"""The translations of operators into ONNX; importing this package registers all of them."""

from . import (  # noqa: F401
    codebooks,
    convolution,
    elementwise,
    embedding,
    experts,
    grouped,
    indexing,
    layers,
    quantized,
    resampling,
    shapes,
)
