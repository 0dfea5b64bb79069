"""Proof that an exported folder computes what the float model computes, as closely as its numbers allow."""

from .formatting import summary_rows, worst_first, worst_linears
from .report import Report, ValueComparison
from .report_store import load

__all__ = ["Report", "ValueComparison", "load", "summary_rows", "worst_first", "worst_linears"]
