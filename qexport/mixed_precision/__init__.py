"""Schemes chosen linear by linear, so that a file of a given size stays as close to the float model as it can."""
