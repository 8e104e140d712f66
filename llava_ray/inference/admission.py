"""How many waiting prompts are prefilled together: a policy of numbers alone."""

from collections.abc import Sequence


def prompts_together(
    waiting: Sequence[int], *, free_slots: int, packed_tokens: int, answering: bool
) -> int:
    """Return how many of the first waiting prompts to run as one; at least one, given a free slot.

    waiting: their tokens, first come first. packed_tokens: those that fill the device. While others
    are being answered only a quarter of these, so that nobody waits for long between two tokens.
    """
    budget = packed_tokens // 4 if answering else packed_tokens
    total, count = 0, 0
    for tokens in waiting[:free_slots]:
        total += tokens
        if count and total > budget:
            break
        count += 1
    return count
