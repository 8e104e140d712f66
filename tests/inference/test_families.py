"""Other backbones and towers: engine and trainer compute what transformers does (D2 to D4)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, IMAGE_TOKENS, write_family
from transformers import AutoTokenizer

from llava_ray.config.run import TrainConfig
from llava_ray.errors import VariantError
from llava_ray.inference.engine import Engine, Prompt
from llava_ray.models.family import family_of
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration
from llava_ray.train.adapt import loss_module
from llava_ray.train.batches import CaptionSamples

KL = {"none-fp32": 1e-4, "none-fp16": 1e-4, "hqq-w8-g64": 1e-3, "bnb-int8": 1e-3, "bnb-nf4": 0.05}
"""Nats a token at most: what rounding costs such small random models, and no more."""


class Case:
    """A family's folder, model and one question with an image, longer than any window."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model = write_family(name, folder)
        self.family = family_of(folder)
        draw = np.random.default_rng(0)
        noise = draw.integers(0, 255, (40, 75, 3), dtype=np.uint8)
        self.image = self.family.pixels(Image.fromarray(noise))
        run = [1022] * self.image.num_tokens
        self.ids = (1, *run, *draw.integers(3, 1000, 60).tolist())
        self.answer: list[int] = draw.integers(3, 1000, 20).tolist()

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.ids, (self.image,))

    def inputs(self, ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([ids]), **self.family.inputs([self.image])}

    @torch.no_grad()
    def logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        found: torch.Tensor = self.model(**self.inputs(ids)).logits[0]
        return found

    def open(self, slug: str, out: Path) -> Engine:
        out.mkdir()
        spec = spec_for(slug)
        spec.quantize(self.folder, out, Calibration("", 0), "cpu")
        return spec.open_engine(out, device="cpu", slots=2, context=256)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("slug", KL)
def test_engines_score_as_transformers_does(case: Case, slug: str, tmp_path: Path) -> None:
    engine = case.open(slug, tmp_path / "out")
    found = engine.score(case.prompt, case.answer).log_softmax(-1)
    expected = case.logits((*case.ids, *case.answer))[len(case.ids) - 1 : -1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    assert float(kl.mean()) <= KL[slug]
    engine.close()


def test_tokens_come_one_by_one_as_in_one_pass(case: Case, tmp_path: Path) -> None:
    engine: Any = case.open("none-fp32", tmp_path / "out")
    assert engine.family.image_tokens(40, 75) == IMAGE_TOKENS.get(case.name, 4)
    slot, logits = engine.prefill(case.prompt)
    ids = case.ids
    for token in (*case.answer[:4], None):
        torch.testing.assert_close(logits, case.logits(ids)[-1], atol=1e-4, rtol=1e-4)
        if token is not None:
            ids = (*ids, token)
            (logits,) = engine.decode([slot], torch.tensor([token]))
    engine.close()


def test_the_loss_is_transformers(case: Case) -> None:
    whole = (*case.ids, *case.answer)
    labels = torch.tensor([-100] * len(case.ids) + case.answer)
    inputs = case.inputs(whole)
    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    samples = CaptionSamples(None, tokenizer, case.family, 2048, 10**6, "")
    batch = samples.collate([inputs | {"input_ids": torch.tensor(whole), "labels": labels}])
    with torch.no_grad():
        expected = case.model(**inputs, labels=labels[None]).loss * len(case.answer)
        found = loss_module(case.model, TrainConfig(fused_layers=False))(**batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "llama", "sliding_window": 5},
        {"model_type": "mistral", "sliding_window": 5, "layer_types": ["full_attention"] * 2},
    ],
)
def test_windows_are_those_that_transformers_heeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any]
) -> None:
    monkeypatch.setitem(FAMILIES, "odd", {"text_config": text})
    case = Case("odd", tmp_path / "base")
    engine = case.open("none-fp32", tmp_path / "out")
    found = engine.score(case.prompt, case.answer).log_softmax(-1)
    expected = case.logits((*case.ids, *case.answer))[len(case.ids) - 1 : -1].log_softmax(-1)
    assert float((found - expected).abs().max()) < 1e-3
    engine.close()


def test_a_projector_without_biases_has_no_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "odd", {"multimodal_projector_bias": False})
    write_family("odd", tmp_path / "base")
    with pytest.raises(VariantError, match="multimodal_projector_bias is false"):
        spec_for("gguf-q8_0").check(tmp_path / "base")
