"""The `qexport::` operators: the seam between the fx graph that PyTorch runs and the ONNX file."""

from . import attention, embedding, grouped, quant  # noqa: F401
