"""How the weights of each format stand in a graph: a file for each that `quant.formats` has; all are imported."""

from ...plugins import import_folder
from .base import GraphForm, form_at, form_at_kernel, form_for, graph_form, match_form

__all__ = ["GraphForm", "form_at", "form_at_kernel", "form_for", "graph_form", "match_form"]

import_folder(__name__)
