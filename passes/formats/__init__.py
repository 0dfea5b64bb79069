"""How the weights of each format stand in a graph: a file for each that `quant.formats` has; all are imported."""

from importlib import import_module
from pkgutil import iter_modules

from .base import GraphForm, form_at, form_at_kernel, form_for, graph_form, match_form

__all__ = ["GraphForm", "form_at", "form_at_kernel", "form_for", "graph_form", "match_form"]

for _found in iter_modules(__path__, f"{__name__}."):
    import_module(_found.name)
