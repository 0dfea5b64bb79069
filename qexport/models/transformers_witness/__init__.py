"""Transformers' own model as a witness: loaded by transformers from the user's folder or GGUF file, attention eager."""
