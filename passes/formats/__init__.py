"""How the weights of each format stand in a graph: a file for each that `quant.formats` has."""

from . import codebooks, integer  # noqa: F401  they register themselves
from .base import GraphForm, form_at, form_at_kernel, form_for, graph_form, match_form

__all__ = ["GraphForm", "form_at", "form_at_kernel", "form_for", "graph_form", "match_form"]
