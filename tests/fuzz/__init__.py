"""Damaged inputs on purpose: of what (seeds), how (mutations), and what the commands make of them (runner)."""
