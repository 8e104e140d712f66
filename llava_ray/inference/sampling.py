"""From logits to tokens, on the engine's device, for many sequences at a time.

Surprising: the random numbers come from the CPU, one per token and sequence, so a seed gives the
same answer on every device and whatever else is in the batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llava_ray.inference.grammar import Matcher


_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn; the defaults are greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    """Less than 1e-5 is greedy: fp32 could not hold the logits that it would divide."""
    top_p: float = 1.0
    seed: int | None = None
    """None draws anew each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these; they are not part of it."""
    top_logprobs: int | None = None
    """How many alternatives each step lists; None computes no log probabilities."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says, for timing."""
    grammar: str | None = None
    """What the answer has to keep to, from `grammar.json_grammar`."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _LEAST_TEMPERATURE


@dataclass(frozen=True)
class Step:
    """One generated token; log probabilities are the model's own, before temperature."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Token ids and log probabilities, the likeliest first."""


class Row:
    """One sequence of a batch: its parameters, its random numbers and where its grammar is."""

    def __init__(self, sampling: SamplingParams, matcher: "Matcher | None" = None) -> None:
        self.sampling, self.matcher = sampling, matcher
        self._random = random.Random(sampling.seed)

    def draw(self) -> float:
        """Return the next uniform number in (0, 1], or 1 where none is needed."""
        return 1.0 if self.sampling.greedy else 1 - self._random.random()


class Sampled:
    """One token per row, on its way to the CPU; `read` waits for it.

    Work launched between sampling and `read` does not delay `read`.
    """

    def __init__(self, tokens: "torch.Tensor", logits: "torch.Tensor", rows: Sequence[Row]) -> None:
        self.tokens = tokens
        """int64 [len(rows)] on the engine's device."""
        self._counts = [row.sampling.top_logprobs for row in rows]
        parts = [tokens]
        if any(count is not None for count in self._counts):
            parts += _logprobs(logits, tokens, max(count or 0 for count in self._counts))
        self._host, self._event = _to_host(parts)

    def read(self) -> list[Step]:
        """Return one step per row."""
        if self._event is not None:
            self._event.synchronize()
        ids = self._host[0].tolist()
        if len(self._host) == 1:
            return [Step(token) for token in ids]
        chosen, values, indices = (part.tolist() for part in self._host[1:])
        return [
            Step(token)
            if count is None
            else Step(token, chosen[i], tuple(zip(indices[i], values[i], strict=True))[:count])
            for i, (token, count) in enumerate(zip(ids, self._counts, strict=True))
        ]


def sample(logits: "torch.Tensor", rows: Sequence[Row]) -> Sampled:
    """Choose a token for each row of logits, float32 [len(rows), vocab_size]."""
    import torch

    params = [row.sampling for row in rows]
    model_logits, logits = logits, _allowed(logits, rows)
    tokens = logits.argmax(dim=-1)
    if not all(p.greedy for p in params):
        # Greedy rows keep their argmax; 1 only spares them a division by zero.
        table = torch.tensor(
            [
                [1.0 if p.greedy else p.temperature, p.top_p, row.draw()]
                for p, row in zip(params, rows, strict=True)
            ]
        ).to(logits.device, non_blocking=True)
        temperature, top_p, uniform = table.unsqueeze(-1).unbind(dim=1)
        nucleus = any(not p.greedy and p.top_p < 1 for p in params)
        drawn = _draw(logits / temperature, top_p if nucleus else None, uniform)
        greedy = torch.tensor([p.greedy for p in params]).to(logits.device)
        tokens = torch.where(greedy, tokens, drawn)
    return Sampled(tokens, model_logits, rows)


def _allowed(logits: "torch.Tensor", rows: Sequence[Row]) -> "torch.Tensor":
    """Return the logits, without those tokens that a row's grammar does not allow."""
    import torch

    if not any(row.matcher for row in rows):
        return logits
    masks = [
        torch.from_numpy(row.matcher.allowed())
        if row.matcher
        else torch.ones(logits.shape[1], dtype=torch.bool)
        for row in rows
    ]
    return logits.masked_fill(~torch.stack(masks).to(logits.device), -torch.inf)


def _draw(
    logits: "torch.Tensor", top_p: "torch.Tensor | None", uniform: "torch.Tensor"
) -> "torch.Tensor":
    """Invert the cumulative distribution at `uniform`, float32 [rows, 1], within the nucleus."""
    import torch

    probabilities = torch.softmax(logits, dim=-1)
    order = None
    if top_p is not None:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        keep = before < top_p
        # Always keep the likeliest, or a tiny top_p would leave nothing.
        keep[:, 0] = True
        probabilities = probabilities * keep
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = uniform.double() * cumulative[:, -1:]
    # The first entry that reaches a target above 0 has weight itself, so no masked token is drawn.
    index = torch.searchsorted(cumulative, target).clamp_(max=logits.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


def _logprobs(logits: "torch.Tensor", tokens: "torch.Tensor", count: int) -> "list[torch.Tensor]":
    """Return the chosen tokens' log probabilities, and the `count` largest with their ids."""
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, indices = logprobs.topk(count, dim=-1)
    return [logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), values, indices]


def _to_host(
    parts: "Sequence[torch.Tensor]",
) -> "tuple[list[torch.Tensor], torch.cuda.Event | None]":
    """Start copies to pinned memory; the event fires when they are there."""
    import torch

    if parts[0].device.type != "cuda":
        return list(parts), None
    host = []
    for part in parts:
        target = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        host.append(target.copy_(part, non_blocking=True))
    return host, torch.cuda.current_stream().record_event()
