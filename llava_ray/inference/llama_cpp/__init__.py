"""A GGUF pair as an engine."""

MAX_SEQUENCES = 256
"""Answers at a time: LLAMA_MAX_SEQ."""
