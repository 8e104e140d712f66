"""A GGUF pair as an engine."""
