"""Quantize PyTorch models through torch.fx passes and run them in ONNX Runtime.

Everything public is here: `export`, `export_auto`, `inspect`, `validate`, `generate`, `Chat`, `bench`, `study`,
`optimize`, `slice_export`, `layout`, `diagnose`, `render`, `compare`, each for every kind of model where it means
something, and the types they take and return. Names are loaded when they are first used, so that importing qexport
costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import needing_runtime
from .gc_pause import no_garbage_collection

# ONNX Runtime from 1.29 on sends telemetry, and leaves a device id in the home folder as soon as it is imported, unless
# it was told not to. Whoever set this, to whatever, has decided.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .api.auto import AutoResult as AutoResult
    from .api.auto import export_auto as export_auto
    from .api.exporting import export as export
    from .api.inspecting import inspect as inspect
    from .api.inspection import Inspection as Inspection
    from .api.result import ExportResult as ExportResult
    from .api.slicing import SliceResult as SliceResult
    from .api.slicing import slice_export as slice_export
    from .api.validating import validate as validate
    from .errors import QExportError as QExportError
    from .recipe.recipe import Recipe as Recipe
    from .report import compare as compare
    from .report import render as render
    from .runtime.benchmark import bench as bench
    from .runtime.chat import Chat as Chat
    from .runtime.doctor import diagnose as diagnose
    from .runtime.drafts import Drafts as Drafts
    from .runtime.generate import Sampling as Sampling
    from .runtime.generate import generate_text as generate  # noqa: F401
    from .runtime.optimized import OptimizedInfo as OptimizedInfo
    from .runtime.optimized import optimize as optimize
    from .runtime.readers import RunsOn as RunsOn
    from .runtime.readers import runs_on as runs_on
    from .runtime.speech import Speech as Speech
    from .runtime.transformers_js import Layout as Layout
    from .runtime.transformers_js import layout as layout
    from .sampling_study import study as study
    from .sampling_study.grid import Grid as Grid
    from .validation.report import Report as Report

_WHERE = {
    "AutoResult": ("api.auto", "AutoResult"),
    "Chat": ("runtime.chat", "Chat"),
    "Drafts": ("runtime.drafts", "Drafts"),
    "ExportResult": ("api.result", "ExportResult"),
    "Grid": ("sampling_study.grid", "Grid"),
    "Inspection": ("api.inspection", "Inspection"),
    "Layout": ("runtime.transformers_js", "Layout"),
    "OptimizedInfo": ("runtime.optimized", "OptimizedInfo"),
    "QExportError": ("errors", "QExportError"),
    "Recipe": ("recipe.recipe", "Recipe"),
    "RunsOn": ("runtime.readers", "RunsOn"),
    "Sampling": ("runtime.generate", "Sampling"),
    "Speech": ("runtime.speech", "Speech"),
    "SliceResult": ("api.slicing", "SliceResult"),
    "Report": ("validation.report", "Report"),
    "bench": ("runtime.benchmark", "bench"),
    "compare": ("report", "compare"),
    "diagnose": ("runtime.doctor", "diagnose"),
    "export": ("api.exporting", "export"),
    "export_auto": ("api.auto", "export_auto"),
    "generate": ("runtime.generate", "generate_text"),
    "inspect": ("api.inspecting", "inspect"),
    "layout": ("runtime.transformers_js", "layout"),
    "optimize": ("runtime.optimized", "optimize"),
    "render": ("report", "render"),
    "runs_on": ("runtime.readers", "runs_on"),
    "slice_export": ("api.slicing", "slice_export"),
    "study": ("sampling_study", "study"),
    "validate": ("api.validating", "validate"),
}

__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qexport")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    with needing_runtime(), no_garbage_collection():  # a fifth of the seconds that the libraries take to import
        value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
