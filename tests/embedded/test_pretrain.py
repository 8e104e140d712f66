import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from llava_ray.config.overrides import load_section
from llava_ray.embedded.captions import DESCRIBE
from llava_ray.embedded.pretrain.augment import patch_targets, random_affine, warp
from llava_ray.embedded.pretrain.examples import Encoder, Examples
from llava_ray.embedded.pretrain.export import export_model, save_checkpoint
from llava_ray.embedded.pretrain.loop import pretrain
from llava_ray.embedded.pretrain.network import Reader, caption_loss, probe_loss, shipped_reader
from llava_ray.embedded.pretrain.scores import describe
from llava_ray.embedded.pretrain.settings import PretrainSettings
from llava_ray.embedded.scene_text import load_assets
from llava_ray.errors import ConfigError
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.folder import EMBEDDED


def small_config(width: int = 64) -> LlavaConfig:
    config = LlavaConfig.from_pretrained(EMBEDDED)
    sizes = {
        "hidden_size": width, "intermediate_size": 128, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": width // 2, "num_hidden_layers": 2,
    }  # fmt: skip
    config.text_config.update(sizes)
    config.vision_config.update(sizes)
    return config


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples(load_assets("train"), Encoder())


def test_exchanges_of_one_pass_are_answered_as_if_each_stood_alone() -> None:
    encoder, reader = Encoder(), shipped_reader().eval()
    first, second = (DESCRIBE, 'A "BOX".'), ("Read all the text.", '"BOX"')
    packed = encoder.pack([first, second])
    ids, positions, segments = (
        torch.from_numpy(packed[name])[None].long() for name in ("ids", "positions", "segments")
    )
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        logits, _ = reader(pixels, ids, positions, segments)
        for number in (1, 2):
            alone = ids[segments == number][None]
            prompt = torch.tensor([encoder.prefix() + [1022] * 196])
            wanted = reader.llava(
                input_ids=torch.cat((prompt, alone), dim=1), pixel_values=pixels
            ).logits[0, prompt.shape[1] :]
            assert torch.allclose(logits[segments == number], wanted, atol=1e-4)


def test_patch_targets_follow_the_moved_letters() -> None:
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
    assert plain[0].tolist() == [0, 0, 0] + [IGNORE_INDEX] * 4


def test_learns_fixed_pictures_by_heart(examples: Examples) -> None:
    torch.manual_seed(0)
    encoder = examples.encoder
    reader = Reader(small_config(), encoder.prefix())
    optimizer = torch.optim.AdamW(reader.parameters(), lr=4e-3)
    made = [examples.make(0.0) for _ in range(2)]
    batch = {name: torch.from_numpy(np.stack([one[name] for one in made])) for name in made[0]}
    maps = torch.eye(2, 3).expand(2, 2, 3)
    pixels = warp(batch["image"], maps)
    targets = patch_targets(batch["glyphs"], maps, size=224, patch=16)
    # The first exchange is enough, and a shorter tail is quicker.
    end = int((batch["segments"] == 1).sum(1).max())
    ids, positions, segments = (
        batch[name][:, :end].long() for name in ("ids", "positions", "segments")
    )
    for _ in range(40):
        logits, guesses = reader(pixels, ids, positions, segments)
        loss = caption_loss(logits, ids, batch["weights"][:, :end])
        loss = loss + 0.2 * probe_loss(guesses, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
    asked, answer = encoder.tokenizer.decode(ids[0].tolist()).split(" ASSISTANT: ", 1)
    images = [Image.fromarray(one["image"]) for one in made]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    said = describe(reader.llava, tokenizer, images, asked.strip())
    assert said[0] == answer.removesuffix("</s>")
    assert said[0].count('"') >= 2
    assert said[0] != said[1]


def test_run_resumes_where_it_ended(tmp_path: Path) -> None:
    settings = PretrainSettings(
        out=tmp_path, batch_size=2, uses=2, workers=1, max_steps=2, log_every_steps=1,
        score_samples=2, warmup_steps=1,
    )  # fmt: skip
    checkpoint = pretrain(settings, small_config())
    first = torch.load(checkpoint, weights_only=True)
    pretrain(settings.model_copy(update={"max_steps": 4, "score_samples": 0}), small_config())
    second = torch.load(checkpoint, weights_only=True)
    assert (first["step"], second["step"]) == (2, 4)
    assert [int(state["optimizer"]["state"][0]["step"]) for state in (first, second)] == [2, 4]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["share"] for row in rows if "loss" in row] == [0.5, 1.0, 0.75, 1.0]
    assert [row["held_out_images"] for row in rows if "loss" not in row] == [2]
    with pytest.raises(ConfigError, match="does not fit"):
        pretrain(settings, small_config(width=128))


def test_exported_folder_is_the_shipped_one_with_other_weights(tmp_path: Path) -> None:
    reader = shipped_reader()
    save_checkpoint(tmp_path, 0, {"reader": reader})
    folder = export_model(tmp_path, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (EMBEDDED / name).read_bytes(), name
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    weights = model.state_dict()
    for name, value in reader.llava.half().state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["minutes"], "has no '='"),
        (["minuts=3"], "did you mean 'minutes'"),
        (["minutes=soon"], "minutes='soon': give a number"),
        (["compile=maybe"], "compile='maybe': give true or false"),
    ],
)
def test_wrong_arguments_are_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_section(PretrainSettings, {}, pairs)
