"""Number formats: each is one object in one file, and found by its name."""

from ..grids import GROUP_SIZES, PER_CHANNEL, PER_TENSOR, ActivationFormat
from .base import QuantizedWeight, WeightFormat, begins_as_scheme, weight_format, weight_formats
from .codebooks import FP4, NF4
from .integer import ExpandedFormat, IntegerFormat
from .scheme import Scheme, full_name, offered

__all__ = [
    "FP4", "GROUP_SIZES", "NF4", "PER_CHANNEL", "PER_TENSOR", "ActivationFormat", "ExpandedFormat", "IntegerFormat",
    "QuantizedWeight", "Scheme", "WeightFormat", "begins_as_scheme", "full_name", "offered", "weight_format",
    "weight_formats",
]  # fmt: skip
