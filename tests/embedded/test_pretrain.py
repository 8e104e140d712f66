import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_ray.embedded.architecture import build_model
from llava_ray.embedded.captions import DESCRIBE
from llava_ray.embedded.pretrain.augment import IGNORE, patch_targets, random_affine, warp
from llava_ray.embedded.pretrain.checkpoint import load_checkpoint
from llava_ray.embedded.pretrain.decode import caption
from llava_ray.embedded.pretrain.examples import FIELDS, Encoder, ExampleMaker
from llava_ray.embedded.pretrain.job import ACTIONS, parse_settings
from llava_ray.embedded.pretrain.loop import (
    PretrainSettings,
    caption_loss,
    learning_rate_share,
    pretrain,
    probe_loss,
)
from llava_ray.embedded.pretrain.network import Probe, Reader, Shape, attention_mask, tail_positions
from llava_ray.embedded.scene_text import load_assets
from llava_ray.errors import ConfigError

SMALL = Shape(hidden=64, heads=2, vision_layers=1, vision_inner=128, text_layers=2, text_inner=128)


@pytest.fixture(scope="module")
def maker() -> ExampleMaker:
    return ExampleMaker(load_assets("train"), Encoder.of(), seed=0)


def _batch(maker: ExampleMaker, count: int, progress: float) -> dict[str, torch.Tensor]:
    made = [maker.make(progress) for _ in range(count)]
    return {name: torch.from_numpy(np.stack([one[name] for one in made])) for name in FIELDS}


def test_logits_equal_those_of_transformers(maker: ExampleMaker) -> None:
    torch.manual_seed(0)
    reader, model = Reader().eval(), build_model(seed=1).eval()
    assert not model.load_state_dict(reader.state_dict(), strict=False).unexpected_keys
    prefix = maker.encoder.prefix()
    tail = maker.encoder.question(DESCRIBE) + maker.encoder.answer('A "BOX".')
    pixels = torch.randn(1, 3, 224, 224)
    start = len(prefix) + reader.shape.patches
    ids = torch.tensor([prefix + [1022] * reader.shape.patches + tail])
    twice = torch.tensor([tail + tail])
    segments = torch.tensor([[1] * len(tail) + [2] * len(tail)])
    with torch.inference_mode():
        wanted = model(input_ids=ids, pixel_values=pixels).logits[:, start:]
        logits = reader.read(
            reader.see(pixels),
            torch.tensor(prefix),
            twice,
            tail_positions(segments, start),
            attention_mask(segments, start),
        )
    # Both exchanges are answered as if each stood alone behind the image.
    for half in logits.split(len(tail), dim=1):
        assert torch.allclose(half, wanted, atol=1e-4)


def test_patch_targets_follow_the_moved_letters(maker: ExampleMaker) -> None:
    glyphs = torch.zeros(1, 96, 7, dtype=torch.uint8)
    glyphs[0, 0] = torch.tensor([100, 60, 34, 0, 1, 2, 3])
    glyphs[0, 1] = torch.tensor([104, 61, 35, 1, 1, 2, 3])
    image = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    image[0, 57:64, 97:104] = 255
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        maps = random_affine(1, torch.device("cpu"), generator)
        targets = patch_targets(glyphs, maps, size=224, patch=16)[0]
        light = warp(image, maps)[0].sum(0).clamp(min=0)
        rows, columns = torch.nonzero(light > 0.8 * light.max(), as_tuple=True)
        y, x = rows.float().mean() + 0.5, columns.float().mean() + 0.5
        cell = targets[int(y // 16) * 14 + int(x // 16)]
        assert 34 in cell[:3].tolist()
        assert int((targets[:, :3] > 0).sum()) == 2
    plain = patch_targets(glyphs, torch.eye(2, 3)[None], size=224, patch=16)[0]
    assert plain[3 * 14 + 6].tolist() == [34, 35, 0, 0, 1, 2, 3]
    assert plain[0].tolist() == [0, 0, 0] + [IGNORE] * 4


def test_learns_fixed_pictures_by_heart(maker: ExampleMaker) -> None:
    batch = _batch(maker, 2, progress=0.0)
    torch.manual_seed(0)
    reader, probe = Reader(SMALL), Probe(SMALL)
    parameters = [*reader.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    prefix = torch.tensor(maker.encoder.prefix())
    start = len(prefix) + SMALL.patches
    maps = torch.eye(2, 3).expand(2, 2, 3)
    pixels = warp(batch["image"], maps)
    targets = patch_targets(batch["glyphs"], maps, size=224, patch=16)
    # The first exchange is enough, and a shorter tail is quicker.
    first = int((batch["segments"] == 1).sum(1).max())
    segments, ids = batch["segments"][:, :first].long(), batch["ids"][:, :first].long()
    weights = batch["weights"][:, :first]
    for _ in range(40):
        features = reader.see(pixels)
        logits = reader.read(
            features, prefix, ids, tail_positions(segments, start), attention_mask(segments, start)
        )
        loss = caption_loss(logits, ids, weights)
        loss = loss + 0.2 * probe_loss(probe(features), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    asked, answer = maker.encoder.tokenizer.decode(ids[0].tolist()).split(" ASSISTANT: ", 1)
    question = asked.strip()
    told = caption(reader, maker.encoder, batch["image"], question, max_new_tokens=24)
    assert answer.startswith(told[0])
    assert told[0].count('"') >= 2
    assert told[0] != told[1]


def test_run_resumes_where_it_ended(tmp_path: Path) -> None:
    settings = PretrainSettings(
        out=tmp_path, shape=SMALL, batch_size=2, pool_size=32, min_pool=32, workers=1,
        max_steps=2, log_every_steps=1, score_samples=0, until=0.5, warmup_steps=1,
    )  # fmt: skip
    first = pretrain(settings)
    assert (first.share, first.steps, first.samples) == (0.5, 2, 4)
    stored = Reader(SMALL)
    load_checkpoint(tmp_path, {"reader": stored})
    second = pretrain(dataclasses.replace(settings, until=1.0))
    assert (second.share, second.steps, second.samples) == (1.0, 4, 8)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["share"] for row in rows if "loss" in row] == [0.0, 0.25, 0.5, 0.75]
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 15_000_000
    other = Reader(dataclasses.replace(SMALL, hidden=128))
    with pytest.raises(ConfigError, match="does not fit"):
        load_checkpoint(tmp_path, {"reader": other})


def test_learning_rate_warms_up_holds_and_ends_small() -> None:
    assert learning_rate_share(0.0, 0, 100) == pytest.approx(0.01)
    assert learning_rate_share(0.3, 500, 100) == 1.0
    assert learning_rate_share(1.0, 500, 100) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["minutes"], "has no '='"),
        (["minuts=3"], "did you mean 'minutes'"),
        (["minutes=soon"], "not a number"),
        (["compile=1"], "true or false"),
    ],
)
def test_wrong_arguments_are_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ACTIONS["train"](parse_settings(pairs))
