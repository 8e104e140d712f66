"""Answers of one engine, one at a time; the scheduler does the same for many together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llava_ray.inference.detokenize import Detokenizer, StopText
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.inference.sampling import Row, SamplingParams, Step, sample

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    """The end-of-sequence token left out."""
    finish_reason: FinishReason
    """`stop`: the model or a stop string ended it; `length`: max_tokens or the context did."""
    steps: tuple[Step, ...]


def budget(engine: Engine, prompt: Prompt, sampling: SamplingParams) -> int:
    """Return how many tokens the answer may have: max_tokens, or what the context leaves."""
    return max(0, min(sampling.max_tokens, engine.context - len(prompt.input_ids)))


def decodes_ahead(engine: Engine) -> bool:
    """Say whether the next step is to be launched before the last token is read.

    On a GPU that hides Python behind the device's work, for one step wasted after the end; on a
    CPU the wasted step would cost as much as any other.
    """
    return engine.device.startswith("cuda")


def generate(engine: Engine, prompt: Prompt, sampling: SamplingParams) -> Iterator[Step]:
    """Yield tokens until the end-of-sequence token (not yielded), max_tokens or the context.

    Stop strings are left to `generate_text`. Raises what `Engine.prefill` raises.
    """
    ahead, left = decodes_ahead(engine), budget(engine, prompt, sampling)
    slot, logits = engine.prefill(prompt)
    try:
        row, batch = Row(sampling), logits.unsqueeze(0)
        while left > 0:
            left -= 1
            sampled = sample(batch, [row])
            if ahead and left:
                batch = engine.decode([slot], sampled.tokens)
            step = sampled.read()[0]
            if step.token_id == engine.eos_token_id and not sampling.ignore_eos:
                return
            yield step
            if left and not ahead:
                batch = engine.decode([slot], sampled.tokens)
    finally:
        engine.release(slot)


def generate_text(engine: Engine, prompt: Prompt, sampling: SamplingParams) -> Completion:
    """Return the whole answer, cut before the first stop string."""
    detokenizer, stop = Detokenizer(engine.tokenizer), StopText(sampling.stop)
    text, steps = "", []
    for step in generate(engine, prompt, sampling):
        steps.append(step)
        text += stop.push(detokenizer.push(step.token_id))
        if stop.stopped:
            break
    if not stop.stopped:
        text += stop.push(detokenizer.flush()) + stop.flush()
    ended = stop.stopped or len(steps) < budget(engine, prompt, sampling)
    return Completion(
        text=text,
        token_ids=tuple(step.token_id for step in steps),
        finish_reason="stop" if ended else "length",
        steps=tuple(steps),
    )
