"""Decode speed of the served engine beside plain transformers, on LLaVA-1.5-7B's shapes.

All rows come from one run on one GPU. Weights are random, so the roundings are named by their
layout; each is checked against plain transformers on the same rounded weights.
"""

import gc
import json
import logging
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.bench.model import Layout, build_model, make_prompt, replace_linears, round_linears
from llava_ray.inference.engine import Prompt
from llava_ray.inference.sampling import Row, SamplingParams, sample
from llava_ray.inference.torch.engine import TorchEngine
from llava_ray.models.images import normalize
from llava_ray.resources.devices import device_name

logger = logging.getLogger(__name__)

PROMPT_TOKENS, NEW_TOKENS, CONTEXT = 600, 128, 1024
CHECKED_TOKENS = 24
REPEATS = 5


@dataclass
class Result:
    """One line of the table."""

    layout: str
    engine: str
    batch: int
    kernel: str
    tokens_per_s: float = 0.0
    tokens_per_s_min: float = 0.0
    tokens_per_s_max: float = 0.0
    first_token_ms: float = 0.0
    warm_up_s: float = 0.0
    bytes_per_step: int = 0
    """Weights, and the keys and values of the middle step."""
    share_of_bandwidth: float = 0.0
    prefill_error: float | None = None
    """Relative L2 distance of logits to plain transformers on the same weights."""
    decode_error: float | None = None
    same_tokens: int | None = None
    """Greedy tokens before the first that differs, of `checked_tokens`."""
    checked_tokens: int = CHECKED_TOKENS
    failed: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Reference:
    """What plain transformers gives for a prompt."""

    tokens: list[int]
    logits: torch.Tensor
    """[CHECKED_TOKENS, vocab]: row i predicts tokens[i]."""


def plain_inputs(prompt: Prompt, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the inputs of `generate`."""
    ids = torch.tensor([prompt.input_ids], device="cuda").repeat(batch, 1)
    pixels = normalize(np.stack(prompt.images), "cuda").to(dtype).repeat(batch, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def reference(model: Any, prompt: Prompt, dtype: torch.dtype) -> Reference:
    """Run plain greedy generation, then all logits by one forward pass."""
    inputs = plain_inputs(prompt, 1, dtype)
    output = model.generate(**inputs, max_new_tokens=CHECKED_TOKENS, do_sample=False)
    ids = output[:, : len(prompt.input_ids) + CHECKED_TOKENS - 1]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**inputs, use_cache=False).logits[0, -CHECKED_TOKENS:].float()
    return Reference(output[0, len(prompt.input_ids) :].tolist(), logits)


def measure_plain(model: Any, prompt: Prompt, batch: int, dtype: torch.dtype) -> Result:
    """Time `generate`."""
    result = Result("fp16", "transformers generate", batch, "cuBLAS")
    inputs = plain_inputs(prompt, batch, dtype)

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    start = time.perf_counter()
    seconds(2)
    result.warm_up_s = time.perf_counter() - start
    first = statistics.median(seconds(1) for _ in range(3))
    rates = [batch * (NEW_TOKENS - 1) / (seconds(NEW_TOKENS) - first) for _ in range(2)]
    return _with_rates(result, rates, [first])


def measure_engine(engine: TorchEngine, prompt: Prompt, batch: int) -> tuple[list[float], float]:
    """Return tokens/s of each repeat, and the median seconds to the first token."""
    rates, firsts = [], []
    for _ in range(REPEATS + 1):
        firsts.append(_first_token_seconds(engine, prompt))
        slots, rows = [], []
        for _ in range(batch):
            slot, logits = engine.prefill(prompt)
            slots.append(slot)
            rows.append(logits)
        sampled = sample(torch.stack(rows), [Row(SamplingParams())] * batch)
        sampled.read()
        start = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            # The next step is launched before the last token is read, as the server does.
            logits = engine.decode(slots, sampled.tokens)
            sampled.read()
            sampled = sample(logits, [Row(SamplingParams())] * batch)
        sampled.read()
        rates.append(batch * (NEW_TOKENS - 1) / (time.perf_counter() - start))
        for slot in slots:
            engine.release(slot)
    return rates[1:], statistics.median(firsts[1:])


def _first_token_seconds(engine: TorchEngine, prompt: Prompt) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    slot, logits = engine.prefill(prompt)
    int(logits.argmax())
    seconds = time.perf_counter() - start
    engine.release(slot)
    return seconds


def check(engine: TorchEngine, prompt: Prompt, expected: Reference, result: Result) -> None:
    """Compare teacher-forced logits, and greedy tokens, with plain transformers."""
    slot, logits = engine.prefill(prompt)
    result.prefill_error = _error(logits, expected.logits[0])
    errors = []
    for index, token in enumerate(expected.tokens[:-1]):
        row = engine.decode([slot], torch.tensor([token], device=engine.device))[0]
        errors.append(_error(row, expected.logits[index + 1]))
    result.decode_error = max(errors)
    engine.release(slot)
    slot, logits = engine.prefill(prompt)
    same = 0
    for token in expected.tokens:
        chosen = logits.argmax(-1, keepdim=True)
        if int(chosen) != token:
            break
        same += 1
        logits = engine.decode([slot], chosen.view(1))[0]
    result.same_tokens = same
    engine.release(slot)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _with_rates(result: Result, rates: Sequence[float], firsts: Sequence[float]) -> Result:
    result.tokens_per_s = statistics.median(rates)
    result.tokens_per_s_min, result.tokens_per_s_max = min(rates), max(rates)
    result.first_token_ms = statistics.median(firsts) * 1000
    return result


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one word: the engine wants one, speed does not."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({"<unk>": 0, "</s>": 2}, unk_token="<unk>")
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(model), eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


class Report:
    """The table, written to disk after every row."""

    def __init__(self, out: Path, bandwidth: float) -> None:
        self.out, self.bandwidth = out, bandwidth
        self.rows: list[Result] = []

    def add(self, row: Result) -> None:
        """Add a row, print it and write all."""
        row.share_of_bandwidth = row.bytes_per_step * row.tokens_per_s / row.batch / self.bandwidth
        self.rows.append(row)
        tree = {
            "device": device_name("cuda"),
            "torch": torch.__version__,
            "code_digest": code_digest("decode_h100"),
            "model": "LLaVA-1.5-7B shapes, random weights",
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "copy_bytes_per_s": self.bandwidth,
            "rows": [asdict(row) for row in self.rows],
        }
        self.out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        logger.info("%s", json.dumps(asdict(row)))

    def table(self) -> str:
        """Return the table as text."""
        lines = [
            f"{'layout':9} {'engine':22} {'batch':>5} {'tok/s':>8} {'min':>8} {'max':>8} "
            f"{'first ms':>8} {'warm s':>6} {'share':>6} {'prefill':>8} {'decode':>8} same  kernel"
        ]
        for row in self.rows:
            error = " ".join(
                f"{'-' if value is None else format(value, '.1e'):>8}"
                for value in (row.prefill_error, row.decode_error)
            )
            lines.append(
                f"{row.layout:9} {row.engine:22} {row.batch:5} {row.tokens_per_s:8.1f} "
                f"{row.tokens_per_s_min:8.1f} {row.tokens_per_s_max:8.1f} "
                f"{row.first_token_ms:8.1f} {row.warm_up_s:6.1f} {row.share_of_bandwidth:6.1%} "
                f"{error} {row.same_tokens}  {row.failed or row.kernel}"
            )
        return "\n".join(lines)


def run(out: Path, layouts: Sequence[Layout] = ("fp16", "int8", "awq-g128", "hqq-g64")) -> str:
    """Measure all layouts and return the table; a failing row is recorded with its reason."""
    from llava_ray.bench.kernels import copy_bandwidth

    report = Report(out, copy_bandwidth())
    prompt = make_prompt(PROMPT_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        for layout in layouts:
            try:
                _measure_layout(report, layout, prompt, Path(folder))
            except Exception as error:
                logger.exception("%s", layout)
                reason = traceback.format_exception_only(error)[-1].strip()[:300]
                report.add(Result(layout, "llava_ray", 1, "", failed=reason))
            gc.collect()
            torch.cuda.empty_cache()
    return report.table()


def _measure_layout(report: Report, layout: Layout, prompt: Prompt, folder: Path) -> None:
    dtype = torch.float16
    model = build_model("cuda", dtype)
    packed = round_linears(model, layout)
    expected = reference(model, prompt, dtype)
    if layout == "fp16":
        for batch in (1, 8):
            row = measure_plain(model, prompt, batch, dtype)
            row.bytes_per_step = _plain_bytes(model) + batch * _cache_bytes()
            report.add(row)
    replace_linears(model, packed)
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine = TorchEngine(model, folder=folder, device="cuda", slots=8, context=CONTEXT)
    del model
    engine.warm_up()
    _first_token_seconds(engine, prompt)
    warm_up = time.perf_counter() - start
    for batch in (1, 8):
        row = Result(layout, "llava_ray", batch, engine.kernel_name(batch), warm_up_s=warm_up)
        if batch == 1:
            check(engine, prompt, expected, row)
        rates, first = measure_engine(engine, prompt, batch)
        row.bytes_per_step = engine.weight_bytes() + batch * _cache_bytes()
        report.add(_with_rates(row, rates, [first]))
    engine.close()


def _plain_bytes(model: Any) -> int:
    parts = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    return sum(part.numel() * part.element_size() for part in parts)


def _cache_bytes() -> int:
    """Keys and values read for one sequence in the middle of its answer: 32 layers of 4096."""
    return 2 * 2 * 32 * 4096 * (PROMPT_TOKENS + NEW_TOKENS // 2)
