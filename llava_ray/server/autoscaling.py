"""How many engine replicas Serve runs, from the answers that they say are under way.

Serve counts its own calls, and answers are none. Its controller gets this module by value.
"""

from typing import Any

ANSWERS = "answers"


def replicas_for_answers(context: Any) -> tuple[float, dict[str, Any]]:
    """Return how many replicas the answers of all need; Serve applies its delays and bounds.

    `context` is a ray.serve.config.AutoscalingContext.
    """
    answers = sum((context.aggregated_metrics or {}).get(ANSWERS, {}).values())
    return answers / context.config.get_target_ongoing_requests(), {}
