"""Answers that keep to a schema beside free ones, where the next step is launched ahead."""

import json
from collections.abc import Hashable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from llava_ray.inference.grammar import json_grammar  # noqa: E402
from llava_ray.inference.prompts import make_prompt  # noqa: E402
from llava_ray.inference.sampling import SamplingParams, Step  # noqa: E402
from llava_ray.inference.scheduler import Item, Scheduler  # noqa: E402
from llava_ray.inference.torch.engine import TorchEngine  # noqa: E402
from llava_ray.models.folder import EMBEDDED  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["stop", "exit"]}, "height": {"type": "integer"}},
    "required": ["kind", "height"],
    "additionalProperties": False,
}


def test_schemas_are_kept_to_beside_free_answers() -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float16)
    engine = TorchEngine(model.cuda(), folder=Path(EMBEDDED), device="cuda", slots=4, context=512)
    engine.warm_up()
    scheduler = Scheduler(engine)
    scheduler.start()
    inbox: SimpleQueue[list[tuple[Hashable, Item]]] = SimpleQueue()
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    kept = [
        SamplingParams(max_tokens=60, temperature=i % 2, seed=i, grammar=json_grammar(SCHEMA))
        for i in range(6)
    ]

    def answers(wanted: list[SamplingParams]) -> list[list[int]]:
        found: dict[Hashable, list[int]] = {i: [] for i in range(len(wanted))}
        for number, sampling in enumerate(wanted):
            scheduler.submit(make_prompt(engine, "Go on."), sampling, inbox.put, number)
        left = len(wanted)
        while left:
            for number, item in inbox.get():
                if isinstance(item, Step):
                    found[number].append(item.token_id)
                else:
                    assert isinstance(item, str), item
                    left -= 1
        return list(found.values())

    try:
        (alone,) = answers([free])
        mixed: list[Any] = [free, *kept, free]
        together = answers(mixed)
    finally:
        scheduler.close()
    assert together[0] == together[-1] == alone
    for ids in together[1:-1]:
        value = json.loads(engine_text(ids))
        assert value["kind"] in ("stop", "exit") and isinstance(value["height"], int)


def engine_text(ids: list[int]) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(EMBEDDED).decode(ids, skip_special_tokens=True))
