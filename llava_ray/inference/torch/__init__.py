"""A PyTorch variant as an engine."""
