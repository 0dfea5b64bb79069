"""ONNX files that qexport did not write, described as if it had: what compares exports compares them too."""

from .describing import Described, describe
from .finding import ForeignFile, find_file, is_foreign
from .running import whole_logits

__all__ = ["Described", "ForeignFile", "describe", "find_file", "is_foreign", "whole_logits"]
