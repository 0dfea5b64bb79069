"""Encoder-decoders (T5, BART, Whisper and their like): two exports in one folder, calibrated and compared together."""
