"""A model of a second and a data set of coloured squares, for tests that train."""

import json
import random
import shutil
from itertools import product
from pathlib import Path

from PIL import Image
from small_data import png_of, write_dataset

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
        train, test = (
            [_row(f"{split}{i}", draw) for i in range(number)]
            for split, number in (("train", num_train), ("test", num_test))
        )
        write_dataset(build.folder, train, test)
        return build.finish(
            DatasetRecord, device="cpu", source="squares", num_train=num_train, num_test=num_test,
            rejected={},
        )  # fmt: skip


def mixed(storage: Path) -> DatasetRecord:
    """Write a data set of rows with no, one and two pictures, of one to three exchanges."""
    store = ArtifactStore(str(storage))
    draw = random.Random(1)
    with store.build(DatasetRecord, "dataset-mixed", settings={}) as build:
        samples = []
        for index, (pictures, exchanges) in enumerate(product((0, 1, 2), (1, 2, 3, 1))):
            rows = [_row(f"{index}-{i}", draw) for i in range(max(1, pictures))]
            answer = rows[0].answer
            turns = [Turn(f"Question {i}?", 0, f"{answer} {i}") for i in range(exchanges)]
            turns[-1] = Turn(turns[-1].text, pictures, turns[-1].answer)
            names = tuple(row.images[0] for row in rows[:pictures])
            files = tuple(row.pictures[0] for row in rows[:pictures])
            system = "Be brief." if index % 2 else None
            samples.append(Sample(str(index), names, tuple(turns), system, files))
        write_dataset(build.folder, samples, samples[:3])
        return build.finish(
            DatasetRecord, device="cpu", source="mixed", num_train=12, num_test=3, rejected={}
        )


def _row(name: str, draw: random.Random) -> Sample:
    left, right = draw.choice(list(COLOURS)), draw.choice(list(COLOURS))
    image = Image.new("RGB", (40, 30), COLOURS[left])
    image.paste(COLOURS[right], (20, 0, 40, 30))
    words = f"{left} and {right}" if left != right else f"all {left}"
    caption = f"{words}." * draw.choice((1, 1, 2))
    turn = Turn("Describe this image in detail.", 1, caption)
    return Sample(name, (f"{name}.png",), (turn,), pictures=(png_of(image),))


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
