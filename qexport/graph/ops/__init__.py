"""The `qexport::` operators: the seam between the fx graph that PyTorch runs and the ONNX file."""

from . import (  # noqa: F401
    attention,
    causal_convolution,
    delta_rule,
    embedding,
    experts,
    grouped,
    indexer,
    linear_attention,
    linear_recurrence,
    matrix_lstm,
    quant,
    recurrent,
    selective_scan,
    wkv,
)
