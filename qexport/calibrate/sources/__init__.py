"""Where calibration tokens come from: each kind of source is one file in `kinds` that declares itself."""

from .loading import check_source, load_samples
from .registry import source_of
from .samples import Samples
from .text import text_windows

__all__ = ["Samples", "check_source", "load_samples", "source_of", "text_windows"]
