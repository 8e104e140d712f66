"""The shipped model's card, filled in from its scores."""

import json
from pathlib import Path
from typing import Any

from llava_ray.artifacts.store import CARD
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.errors import ConfigError
from llava_ray.models.folder import weights_sha256

LOG = "pretrain_log.jsonl"

CARD_TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# A tiny LLaVA that reads

LLaVA-1.5's parts in small: a CLIP tower (7 layers of width 256, the sixth selected), a two-layer
GELU projector and a Llama (6 layers of width 256), 11.5 million weights, fp16. It reads generated
scene text and says where and on what it stands. It is a yardstick for fine-tuning and
quantization on a CPU; it knows nothing of photographs.

## Training
Everything was trained from scratch in LLaVA's two stages by `jobs/pretrain.py`: first
transcription of single words growing into scenes, then questions of many kinds. A probe that
names the letters of each patch trained beside it and was dropped.

| | |
| --- | --- |
| steps | {steps:,} |
| pictures a step | {batch_size} |
| pictures trained on a second | {trained_per_s:,.0f} |
| fresh pictures rendered a second | {rendered_per_s:,.0f} |
| seed | {seed} |

`pretrain_log.jsonl` beside this card is the run's own log.

The pictures are drawn from the fonts and words of the packages in the extra `scene-text`. A tenth
of the words (by hash) and the families Caladea, Fredoka One and Hanken Grotesk were held out.

## Scores
The question is "{question}" and the answers are greedy. Words are pooled;
neither case nor the marks around a word count.

| words and fonts | scenes | words read | character errors | ROUGE-L |
| --- | ---: | ---: | ---: | ---: |
| held out | {held_out_images} | {held_out[word_recall]:.1%} | \
{held_out[character_error_rate]:.1%} | {held_out[rouge_l]:.3f} against the fine-tune's captions |
| of training | {train_images} | {train[word_recall]:.1%} | \
{train[character_error_rate]:.1%} | {train[rouge_l]:.3f} against captions as in training |

The fine-tune's captions say the same in GPT-4V's style, which the model has not seen before. In
`pretrain_log.jsonl` a word counts only if quoted exactly, case and marks included.
"""


def write_card(folder: Path, scores: Path, embedded: Path) -> Path:
    """Write the model card from the scores and from the training's log in the model's folder.

    `scores` is what score_model wrote, `embedded` what llava_ray.bench.embedded wrote of held-out
    words and fonts. Raises ConfigError where one is missing or is of other weights.
    """
    if not (folder / LOG).is_file():
        raise ConfigError(f"the card needs {folder / LOG}, which is missing")
    own, held_out = (_read(path, weights_sha256(folder)) for path in (scores, embedded))
    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    trained = PretrainSettings()
    paced = [row for row in rows if "trained_per_s" in row]
    text = CARD_TEXT.format(
        steps=rows[-1]["step"],
        batch_size=trained.batch_size,
        trained_per_s=paced[-1]["trained_per_s"],
        rendered_per_s=paced[-1]["rendered_per_s"],
        seed=trained.seed,
        question=own["question"],
        held_out_images=held_out["held_out_samples"],
        held_out=held_out["base"],
        train_images=own["images"],
        train=own["train"],
    )
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path


def _read(path: Path, weights: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"the card needs {path}, which is missing")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if tree["base_model_sha256"] != weights:
        raise ConfigError(f"{path} is of other weights than the model's: score the model anew")
    return tree
