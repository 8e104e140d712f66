"""How the table's cells read: headings, units and digits, the same in HTML and Markdown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_ray.artifacts.records import Spread
from llava_ray.report.rows import Row

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    group: str
    title: str
    meaning: str
    cell: Callable[[Row], str]
    bar: Callable[[Row], float] | None = None
    """A value from 0 up that is drawn behind the cell, if any."""

    def bar_share(self, row: Row, rows: Sequence[Row]) -> float | None:
        """Return that value as a share of the column's largest."""
        return None if self.bar is None else self.bar(row) / max(map(self.bar, rows))


def make_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns; sizes are in GB for models of that size, else in MB."""
    size, size_name = unit_of([row.size_bytes for row in rows])
    memory, memory_name = unit_of([row.memory_bytes for row in rows])
    return [
        Column("Size", size_name,
               "Files of the variant on disk (as estimated from the model's shapes before).",
               lambda r: number(r.size_bytes, 1 / size) + (
                   "" if r.estimated_bytes is None
                   else f" (est. {number(r.estimated_bytes, 1 / size)})"),
               lambda r: r.size_bytes or 0),
        Column("Size", "bits", "Bits per quantized weight, scales and zeros counted in.",
               lambda r: number(r.bits_per_weight)),
        Column("Size", f"memory {memory_name}",
               "Peak of a process of its own: resident with its libraries, or allocated on a GPU.",
               lambda r: number(r.memory_bytes, 1 / memory)),
        Column("Speed", "tok/s", "Decoded tokens per second, one sequence: median (low–high).",
               lambda r: ranged(r.decode_tokens_per_s),
               lambda r: r.decode_tokens_per_s.median if r.decode_tokens_per_s else 0),
        Column("Speed", "bandwidth",
               "Share of the device's measured copy bandwidth that reading the weights takes.",
               lambda r: _percent(r.bandwidth_share)),
        Column("Speed", "prefill ms", "Image and question to the first token: median (low–high).",
               lambda r: ranged(r.prefill_s, 1000)),
        Column("Speed", "load s", "Opening the variant in a new process.",
               lambda r: number(r.load_s)),
        Column("Fidelity", "KL nats",
               "Mean KL(baseline || variant) over the same caption tokens and pixels: "
               "mean (95% interval).",
               lambda r: ranged(r.kl_divergence)),
        Column("Fidelity", "top-1", "Share of those tokens with the baseline's argmax.",
               lambda r: _percent(r.top1_agreement)),
        Column("Fidelity", "perplexity", "Of the reference captions.",
               lambda r: number(r.perplexity)),
        Column("Captions", "words read", "Share of the quoted words in the reference it repeats.",
               lambda r: _percent(r.scores.get("word_recall"))),
        Column("Captions", "char errors", "Edits per character of those words.",
               lambda r: _percent(r.scores.get("character_error_rate"))),
        Column("Captions", "ROUGE\u2011L", "F-measure against the reference caption.",
               lambda r: number(r.scores.get("rouge_l"))),
        Column("Captions", "CIDEr\u2011D", "0 to 10.", lambda r: number(r.scores.get("cider_d"))),
        Column("Making", "seconds", "Quantizing, as a Ray task.",
               lambda r: number(r.quantize_s)),
        Column("Making", f"peak {memory_name}",
               "Most memory of that task: resident, or allocated on a GPU.",
               lambda r: number(r.quantize_peak_memory_bytes, 1 / memory)),
        Column("Article*", "GB", "The article's figure, on another device and model.",
               lambda r: number(r.article_size_gb)),
        Column("Article*", "tok/s", "The article's figure, on another device and model.",
               lambda r: number(r.article_tokens_per_s)),
    ]  # fmt: skip


def size_text(size_bytes: float) -> str:
    """Write a size with the unit that suits it."""
    unit, name = unit_of([size_bytes]) if size_bytes >= 1e5 else (1e3, "kB")
    return f"{number(size_bytes, 1 / unit)} {name}"


def unit_of(sizes: Sequence[float | None]) -> tuple[float, str]:
    """Return the unit that suits the largest size, and its name."""
    largest = max((size for size in sizes if size is not None), default=0)
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")


def number(value: float | None, scale: float = 1) -> str:
    """Write three significant digits of the product, without an exponent where that is readable."""
    if value is None:
        return MISSING
    value *= scale
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.1e}"
    # Zeros at the end stay, so that figures below each other line up.
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def ranged(spread: Spread | None, scale: float = 1, *, signed: bool = False) -> str:
    """Write the middle with its range; `signed` is for differences, whose plus sign is shown."""
    if spread is None:
        return MISSING
    median, low, high = (
        f"{'+' if signed and value > 0 else ''}{number(value, scale)}"
        for value in (spread.median, spread.low, spread.high)
    )
    joint = " to " if signed else "–"
    return median if low == high == median else f"{median} ({low}{joint}{high})"
