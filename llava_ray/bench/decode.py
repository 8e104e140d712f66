"""Speed of the served engine beside plain transformers, on LLaVA-1.5-7B's shapes.

A row's requests are sent to the server's own scheduler at once, each with a picture of its own.
All rows come from one run on one GPU. Weights are random, so the roundings are named by their
layout; each is checked against plain transformers on the same rounded weights.
"""

import gc
import json
import logging
import statistics
import threading
import time
import traceback
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from llava_ray.bench import results
from llava_ray.bench.model import Layout, make_prompt, round_linears
from llava_ray.benchmark.timing import copy_bytes_per_s
from llava_ray.inference.engine import Prompt
from llava_ray.inference.sampling import SamplingParams, Step
from llava_ray.inference.scheduler import Item, Scheduler
from llava_ray.inference.torch.engine import TorchEngine
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.images import normalize
from llava_ray.models.shapes import LLAVA_7B, random_model

logger = logging.getLogger(__name__)

PROMPT_TOKENS, NEW_TOKENS, CONTEXT = 600, 128, 1024
CHECKED_TOKENS = 24
REPEATS = 5
BATCHES = (1, 8, 64)


def run(out: Path) -> None:
    """Measure all layouts and write a row for each; a failing one is recorded with its reason."""
    bandwidth = copy_bytes_per_s("cuda")
    tree: dict[str, Any] = {
        "model": "LLaVA-1.5-7B shapes, random weights",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "checked_tokens": CHECKED_TOKENS,
        "copy_bytes_per_s": bandwidth,
        "rows": [],
    }

    def add(row: dict[str, Any]) -> None:
        logger.info("%s", json.dumps(row))
        tree["rows"].append(row)
        results.write(out, "decode_h100", tree, "cuda")

    for layout in get_args(Layout):
        try:
            for row in _measured(layout, make_prompt(PROMPT_TOKENS)):
                share = row["bytes_per_step"] * row["tokens_per_s"] / row["batch"] / bandwidth
                add({"layout": layout, **row, "share_of_bandwidth": share})
        except Exception as error:
            logger.exception("%s", layout)
            reason = traceback.format_exception_only(error)[-1].strip()[:300]
            add({"layout": layout, "engine": "llava_ray", "failed": reason})
        gc.collect()
        torch.cuda.empty_cache()


def _measured(layout: Layout, prompt: Prompt) -> Iterator[dict[str, Any]]:
    model = random_model(LLAVA_7B, "cuda", torch.float16).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    packed = round_linears(model, layout)
    expected = reference(model, prompt)
    if layout == "fp16":
        parts = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
        weight_bytes = sum(part.nbytes for part in parts)
        for batch in BATCHES[:2]:
            yield measure_plain(model, prompt, batch) | _step(batch, weight_bytes)
    for name, module in packed.items():
        model.model.language_model.layers.set_submodule(name, module)
    torch.cuda.synchronize()
    start = time.perf_counter()
    # The engine wants some tokenizer; speed does not depend on it.
    engine = TorchEngine(model, folder=EMBEDDED, device="cuda", slots=max(BATCHES), context=CONTEXT)
    del model
    engine.warm_up()
    _first_token_s(engine, prompt)
    warm_up_s = time.perf_counter() - start
    checked = check(engine, prompt, expected)
    scheduler = Scheduler(engine)
    scheduler.start()
    for batch in BATCHES:
        about = {"engine": "llava_ray", "kernel": engine.kernel_name(batch), "warm_up_s": warm_up_s}
        step = _step(batch, engine.weight_bytes())
        yield about | measure_engine(scheduler, batch) | step | (checked if batch == 1 else {})
    scheduler.close()


def _step(batch: int, weight_bytes: int) -> dict[str, int]:
    """Return what a decode step reads: weights, and 16-bit keys and values in mid-answer."""
    text = LLAVA_7B["text_config"]
    positions = PROMPT_TOKENS + NEW_TOKENS // 2
    cache_bytes = 2 * 2 * text["num_hidden_layers"] * text["hidden_size"] * positions
    return {"batch": batch, "bytes_per_step": weight_bytes + batch * cache_bytes}


def _plain_inputs(prompt: Prompt, batch: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([prompt.input_ids], device="cuda").repeat(batch, 1)
    pixels = normalize(prompt.images[0].tiles, "cuda").half().repeat(batch, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def reference(model: Any, prompt: Prompt) -> tuple[list[int], list[torch.Tensor]]:
    """Return the greedy tokens of plain transformers, and the logits [1, vocab] of each."""
    output = model.generate(
        **_plain_inputs(prompt, 1), max_new_tokens=CHECKED_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences[0, len(prompt.input_ids) :].tolist(), list(output.logits)


def measure_plain(model: Any, prompt: Prompt, batch: int) -> dict[str, Any]:
    """Time `generate`."""
    inputs = _plain_inputs(prompt, batch)

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    about = {"engine": "transformers generate", "kernel": "cuBLAS", "warm_up_s": seconds(2)}
    first_s = statistics.median(seconds(1) for _ in range(3))
    return about | _speeds(batch, [Wave(first_s, first_s, seconds(NEW_TOKENS)) for _ in range(2)])


@dataclass(frozen=True)
class Wave:
    """Seconds after requests were sent at once."""

    first_s: float
    """The median of their first tokens."""
    last_first_s: float
    """The last of these."""
    end_s: float


def measure_engine(scheduler: Scheduler, batch: int) -> dict[str, float]:
    """Time as many requests as come at once; the first repeat warms up."""
    prompts = [make_prompt(PROMPT_TOKENS, seed) for seed in range(batch)]
    return _speeds(batch, [_wave(scheduler, prompts) for _ in range(REPEATS + 1)][1:])


def _wave(scheduler: Scheduler, prompts: Sequence[Prompt]) -> Wave:
    firsts: dict[Hashable, float] = {}
    left, done = set(range(len(prompts))), threading.Event()
    failures: list[Item] = []

    def take(items: list[tuple[Hashable, Item]]) -> None:
        now = time.perf_counter() - start
        for key, item in items:
            if isinstance(item, Step):
                firsts.setdefault(key, now)
                continue
            left.discard(key)
            if item != "length":
                failures.append(item)
        if not left:
            done.set()

    start = time.perf_counter()
    for key, prompt in enumerate(prompts):
        scheduler.submit(prompt, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True), take, key)
    done.wait()
    end = time.perf_counter() - start
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(prompts)} requests failed: {failures[0]}")
    return Wave(statistics.median(firsts.values()), max(firsts.values()), end)


def _speeds(batch: int, waves: Sequence[Wave]) -> dict[str, float]:
    """Return the tokens/s of all answers: of decoding alone, and with the prefill."""
    rates = [batch * (NEW_TOKENS - 1) / (wave.end_s - wave.last_first_s) for wave in waves]
    totals = [batch * NEW_TOKENS / wave.end_s for wave in waves]
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "total_tokens_per_s": statistics.median(totals),
        "total_tokens_per_s_min": min(totals),
        "total_tokens_per_s_max": max(totals),
        "first_token_ms": statistics.median(wave.first_s for wave in waves) * 1000,
        "last_first_token_ms": statistics.median(wave.last_first_s for wave in waves) * 1000,
    }


def _first_token_s(engine: TorchEngine, prompt: Prompt) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    slot, logits = engine.prefill(prompt)
    int(logits.argmax())
    seconds = time.perf_counter() - start
    engine.release(slot)
    return seconds


def check(
    engine: TorchEngine, prompt: Prompt, expected: tuple[list[int], list[torch.Tensor]]
) -> dict[str, float]:
    """Return relative L2 errors of logits against plain transformers, token by token of its answer,
    and how many greedy tokens come before the first that differs."""
    slot, logits = engine.prefill(prompt)
    errors: list[float] = []
    agrees: list[bool] = []
    for token, plain in zip(*expected, strict=True):
        errors.append(float((logits - plain[0].float()).norm() / plain.float().norm()))
        agrees.append(int(logits.argmax()) == token)
        logits = engine.decode([slot], torch.tensor([token], device=engine.device))[0]
    engine.release(slot)
    same = [*agrees, False].index(False)
    return {"prefill_error": errors[0], "decode_error": max(errors[1:]), "same_tokens": same}
