"""The table of the article that llava_ray follows, to stand beside what is measured here."""

CONDITIONS = (
    "one L4, LLaVA-1.5-7B fine-tuned on TextOCR captions (its GGUF sizes fit the text model's file "
    "alone, without the vision tower's)"
)

TABLE: dict[str, tuple[float, float]] = {
    "gguf-q2_k": (2.53, 3.85),
    "hqq-w2-g64": (3.73, 8.4),
    "gguf-q4_k_m": (4.08, 4.43),
    "hqq-w4-g64": (4.11, 7.3),
    "awq-w4-g128": (4.54, 22.7),
    "bnb-nf4": (5.01, 5.8),
}
"""Size in GB and tokens/s, by slug."""
