"""Passes that see the whole model before its blocks are quantized one by one."""
