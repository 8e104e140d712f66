"""A model of a second and a data set of coloured squares, for tests that train."""

import json
import random
import shutil
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from llava_ray.artifacts.records import DatasetRecord
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig, load_config
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample
from llava_ray.models.folder import EMBEDDED

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (20, 40, 220)}


def small_model(folder: Path) -> Path:
    """Write a random LLaVA with the embedded tokenizer and processor: 4 image tokens, 2 layers."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"] |= {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    }  # fmt: skip
    tree["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "image_size": 32,
    }  # fmt: skip
    tree["image_seq_length"] = 4
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(**tree)).float().save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    images = json.loads(path.read_text())
    images |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    path.write_text(json.dumps(images))
    return folder


def squares(storage: Path, *, num_train: int = 24, num_test: int = 4) -> DatasetRecord:
    """Write a data set whose captions name the colours of two halves, of unequal lengths."""
    store = ArtifactStore(str(storage))
    draw = random.Random(0)
    with store.build(DatasetRecord, "dataset-squares", settings={}) as build:
        (build.folder / "images").mkdir()
        for split, number in (("train", num_train), ("test", num_test)):
            rows = [_row(build.folder, f"{split}{i}", draw) for i in range(number)]
            (build.folder / f"{split}.json").write_text(json.dumps(rows))
        return build.finish(
            DatasetRecord, device="cpu", source="squares", num_train=num_train, num_test=num_test,
            rejected={},
        )  # fmt: skip


def mixed(storage: Path) -> DatasetRecord:
    """Write a data set of rows with no, one and two pictures, of one to three exchanges."""
    store = ArtifactStore(str(storage))
    draw = random.Random(1)
    with store.build(DatasetRecord, "dataset-mixed", settings={}) as build:
        (build.folder / "images").mkdir()
        samples = []
        for index, (pictures, exchanges) in enumerate(product((0, 1, 2), (1, 2, 3, 1))):
            rows = [_row(build.folder, f"{index}-{i}", draw) for i in range(max(1, pictures))]
            answer = rows[0]["conversations"][1]["value"]
            turns = [Turn(f"Question {i}?", 0, f"{answer} {i}") for i in range(exchanges)]
            turns[-1] = Turn(turns[-1].text, pictures, turns[-1].answer)
            names = tuple(row["image"] for row in rows[:pictures])
            system = "Be brief." if index % 2 else None
            samples.append(Sample(str(index), names, tuple(turns), system))
        for split, part in (("train", samples), ("test", samples[:3])):
            (build.folder / f"{split}.json").write_text(
                json.dumps([sample.as_llava() for sample in part])
            )
        return build.finish(
            DatasetRecord, device="cpu", source="mixed", num_train=12, num_test=3, rejected={}
        )


def _row(folder: Path, name: str, draw: random.Random) -> dict[str, Any]:
    left, right = draw.choice(list(COLOURS)), draw.choice(list(COLOURS))
    image = Image.new("RGB", (40, 30), COLOURS[left])
    image.paste(COLOURS[right], (20, 0, 40, 30))
    image.save(folder / "images" / f"{name}.png")
    words = f"{left} and {right}" if left != right else f"all {left}"
    caption = f"{words}." * draw.choice((1, 1, 2))
    return {
        "id": name,
        "image": f"{name}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nDescribe this image in detail."},
            {"from": "gpt", "value": caption},
        ],
    }


def config_for(storage: Path, model: Path, *overrides: str) -> RunConfig:
    """Return a config of a short run."""
    return load_config(
        None,
        [
            f"storage.uri={storage}", f"model.path={model}", "train.lora_r=4",
            "train.lora_alpha=8", "train.num_workers=1", "train.cpus_per_worker=1",
            "train.trackers=[]", "resources.node_types=up", *overrides,
        ],
    )  # fmt: skip
