"""What sweep.objective may say."""

import pytest

from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError
from llava_ray.sweep.objective import BEST_SCORES, Objective
from llava_ray.trial_score import scorer_for


@pytest.mark.parametrize(
    ("text", "measure", "slug", "label"),
    [
        ("eval_loss", "eval_loss", None, "eval_loss"),
        ("rouge_l", "rouge_l", None, "1 - rouge_l"),
        ("rouge_l after awq-w4-g128", "rouge_l", "awq-w4-g128", "1 - rouge_l after awq-w4-g128"),
        ("cider_d after bnb-nf4", "cider_d", "bnb-nf4", "10 - cider_d after bnb-nf4"),
        ("character_error_rate", "character_error_rate", None, "character_error_rate"),
    ],
)
def test_objectives_are_read(text: str, measure: str, slug: str | None, label: str) -> None:
    objective = Objective.parse(text)
    assert objective == Objective(measure, slug)
    assert objective.label == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rogue_l", "did you mean 'rouge_l'"),
        ("eval_loss after bnb-nf4", "use eval_loss, or one of"),
        ("rouge_l after ", "use eval_loss, or one of"),
        ("rouge_l after hqq-w5-g64", "unknown variant 'hqq-w5-g64'"),
    ],
)
def test_other_objectives_are_refused_before_training(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer_for(load_config(None, [f"sweep.objective={text}"]))


def test_only_eval_loss_needs_no_scorer() -> None:
    assert scorer_for(load_config(None, ["sweep.objective=eval_loss"])) is None
    assert scorer_for(load_config(None, ["sweep.objective=word_recall after gguf-q4_k_m"]))


def test_better_captions_lose_less() -> None:
    for measure, best in BEST_SCORES.items():
        objective, towards = Objective(measure, None), 0.1 if best else -0.1
        assert objective.loss(best) == 0
        assert objective.loss(0.5 + towards) < objective.loss(0.5)
