"""Number formats: each is one object in one file of this folder, and found by its name.

Files register their formats when they are imported, and all of them are. `passes.formats` has the halves that know
graphs, and `lower.ops` the translations of their operators.
"""

from ...plugins import import_folder
from ..grids import GROUP_SIZES, PER_CHANNEL, PER_TENSOR, ActivationFormat
from .base import QuantizedWeight, WeightFormat, begins_as_scheme, weight_format, weight_formats
from .integer import ExpandedFormat, IntegerCodes, IntegerFormat
from .scheme import Scheme, full_name, offered
from .stepped import ScaledFormat, SteppedFormat

__all__ = [
    "GROUP_SIZES", "PER_CHANNEL", "PER_TENSOR", "ActivationFormat", "ExpandedFormat", "IntegerCodes", "IntegerFormat",
    "QuantizedWeight", "ScaledFormat", "Scheme", "SteppedFormat", "WeightFormat", "begins_as_scheme", "full_name",
    "offered", "weight_format", "weight_formats",
]  # fmt: skip

import_folder(__name__)
