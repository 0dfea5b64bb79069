"""Recurrences over a text, a file for each: loops and chunks of transformers' code as one node of the graph."""

from ...plugins import import_folder
from .registry import recurrences_as_nodes

import_folder(__name__)

__all__ = ["recurrences_as_nodes"]
