"""Fine-tune LLaVA, quantize it, measure the variants and serve the winner, on Ray."""

__version__ = "0.1.0"
