"""A sweep's trial judged as what will be served: merged, quantized, and asked for captions.

The stages' own functions do it, over a storage of its own that vanishes with the score.
"""

import hashlib
import logging

from llava_ray import benchmark, merge, quantize
from llava_ray.artifacts.records import DatasetRecord, VariantFailure
from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import RunConfig, changed
from llava_ray.errors import DataError, VariantError
from llava_ray.quantize.registry import spec_for
from llava_ray.sweep.objective import Objective, Scorer
from llava_ray.train import seal_midway

logger = logging.getLogger(__name__)


def score_trial(config: RunConfig, dataset: DatasetRecord, checkpoint: str, step: int) -> float:
    """Return what the captions of the checkpoint's model lack of the best score.

    A `Scorer`. Raises VariantError where the variant cannot be made, DataError without
    held-out samples.
    """
    objective = Objective.parse(config.sweep.objective)
    slug = objective.slug or config.benchmark.baseline
    name = hashlib.sha256(checkpoint.encode()).hexdigest()[:12]
    # In the sweep's own folder, with which it goes where this process is killed.
    sweep = checkpoint.rpartition("/trials/")[0].rpartition("/")[2] or "scores"
    storage = Storage(f"{config.storage.uri.rstrip('/')}/work/{sweep}/score-{name}")
    variants, baseline = {"variants": (slug,)}, {"baseline": slug}
    apart = changed(config, storage={"uri": storage.uri}, quantize=variants, benchmark=baseline)
    try:
        adapter = seal_midway(apart, dataset, checkpoint, step)
        (variant,) = quantize.run(apart, merge.run(apart, adapter), dataset)
        if isinstance(variant, VariantFailure):
            raise VariantError(f"variant {slug!r}: {variant.reason}")
        scores = benchmark.score_captions(apart, variant, dataset)
    finally:
        storage.remove()
    found = scores.get(objective.measure)
    if found is None:
        raise DataError(
            f"sweep.objective {objective.measure!r}: the held-out captions quote no words to be "
            "read; use rouge_l or cider_d"
        )
    logger.info("step %d: %s is %.4f as %s", step, objective.measure, found, slug)
    return objective.loss(found)


def scorer_for(config: RunConfig) -> Scorer | None:
    """Return what judges a trial's checkpoints, or None where the training's own loss does.

    Raises ConfigError for an objective or a slug that does not exist.
    """
    objective = Objective.parse(config.sweep.objective)
    if objective.measure == "eval_loss":
        return None
    spec_for(objective.slug or config.benchmark.baseline)
    return score_trial
