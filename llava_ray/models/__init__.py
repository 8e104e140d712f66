"""Base models: their folders, weights, shapes, pixels and prompts."""
