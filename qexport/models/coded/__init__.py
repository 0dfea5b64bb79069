"""Checkpoints whose weights are codes already: one file for each method, and found by what a config says.

Files register their formats when they are imported, and all of them are.
"""

from ...plugins import import_folder
from .base import CodedCheckpoint, CodedStack, CodedWeight, Given, Header, Order, coded_checkpoint, format_of

__all__ = ["CodedCheckpoint", "CodedStack", "CodedWeight", "Given", "Header", "Order", "coded_checkpoint", "format_of"]

import_folder(__name__)
