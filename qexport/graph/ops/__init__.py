"""The `qexport::` operators: the seam between the fx graph that PyTorch runs and the ONNX file."""

from . import attention, causal_convolution, delta_rule, embedding, experts, grouped, quant, recurrent  # noqa: F401
