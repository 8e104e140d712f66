"""The order of samples, their encoding and the learning rate."""

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import small_model, squares

from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import TrainConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.dataset import Split
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED
from llava_ray.train.adapt import rate_factor
from llava_ray.train.batches import (
    CaptionSamples,
    StreamOrder,
    eval_batches,
    rank_batches,
    train_batches,
)

LENGTHS = tuple((7 * i) % 31 + 1 for i in range(50))


def order(seed: int = 0, by_length: bool = True) -> StreamOrder:
    return StreamOrder(LENGTHS, seed, group=4, by_length=by_length)


@pytest.mark.parametrize("by_length", [True, False])
def test_each_epoch_has_every_sample_in_another_order(by_length: bool) -> None:
    stream = order(by_length=by_length)
    count = stream.epoch_length
    assert count == (52 if by_length else 50)
    first = [stream.at(i) for i in range(count)]
    second = [stream.at(i) for i in range(count, 2 * count)]
    assert sorted(first[:50]) == sorted(second[:50]) == list(range(50))
    assert first != second
    assert first == [order(by_length=by_length).at(i) for i in range(count)]
    assert first != [order(seed=1, by_length=by_length).at(i) for i in range(count)]


@pytest.mark.parametrize(("count", "group"), [(1003, 8), (1000, 8), (10_007, 16), (5, 8)])
def test_one_step_an_epoch_at_most_has_pictures_beside_text_alone(count: int, group: int) -> None:
    lengths = tuple((1 + i % 50) * (-1 if i % 3 == 0 else 1) for i in range(count))
    stream = StreamOrder(lengths, 0, group, by_length=True)
    steps = -(-count // group)
    assert stream.epoch_length == steps * group
    for epoch in range(3):
        start = epoch * stream.epoch_length
        signs = [lengths[stream.at(start + i)] < 0 for i in range(stream.epoch_length)]
        groups = [set(signs[g * group : (g + 1) * group]) for g in range(steps)]
        assert sum(len(kinds) == 2 for kinds in groups) <= 2


def test_groups_hold_samples_of_like_length() -> None:
    def spread(stream: StreamOrder) -> float:
        groups = [[LENGTHS[stream.at(4 * g + i)] for i in range(4)] for g in range(12)]
        return sum(max(group) - min(group) for group in groups) / 12

    assert spread(order()) < 0.3 * spread(order(by_length=False))


def take(batches: Iterator[list[int]], count: int) -> list[list[int]]:
    return [indices for indices, _ in zip(batches, range(count), strict=False)]


def test_ranks_share_the_stream_and_resume_by_position() -> None:
    stream = order()
    ranks = [take(rank_batches(stream, 0, 2, rank, 3), 4) for rank in range(3)]
    merged = [index for step in zip(*ranks, strict=True) for batch in step for index in batch]
    assert merged == [stream.at(i) for i in range(24)]
    resumed = [take(rank_batches(stream, 12, 4, rank, 1), 3) for rank in range(1)]
    assert [i for batch in resumed[0] for i in batch] == merged[12:]


@pytest.mark.parametrize("workers", [1, 4])
def test_what_two_workers_began_others_go_on_with(workers: int) -> None:
    stream = order()
    begun = [take(rank_batches(stream, 0, 2, rank, 2), 3) for rank in range(2)]
    rest = [take(rank_batches(stream, 12, 2, rank, workers), 3) for rank in range(workers)]
    seen = [
        index
        for ranks in (begun, rest)
        for step in zip(*ranks, strict=True)
        for batch in step
        for index in batch
    ]
    assert seen == [stream.at(i) for i in range(12 + 6 * workers)]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> CaptionSamples:
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("captions")
    model = small_model(root / "model")
    data = Path(squares(root / "store", num_train=10, num_test=3).uri)
    return CaptionSamples(
        Split(Storage(str(data)), "train"), AutoTokenizer.from_pretrained(model),
        family_of(model), 2048, 10**6, "",
    )  # fmt: skip


def test_padding_carries_no_loss_and_no_attention(captions: CaptionSamples) -> None:
    samples = [captions[i] for i in range(6)]
    batch = captions.collate(samples)
    assert len({len(s["input_ids"]) for s in samples}) > 1
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], sample["input_ids"])
        assert batch["attention_mask"][row].sum() == length
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, length:] == 1023).all()
    assert batch["pixel_values"].shape == (6, 3, 32, 32)


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_loader_gives_what_the_order_says(captions: CaptionSamples, loader_workers: int) -> None:
    stream = StreamOrder(tuple(captions.split.letters.tolist()), 0, 4, True)
    mine = rank_batches(stream, 0, 2, 0, 1)
    loader = train_batches(captions, mine, loader_workers=loader_workers, pin_memory=False)
    for indices, batch in zip(take(rank_batches(stream, 0, 2, 0, 1), 3), loader, strict=False):
        expected = captions.collate([captions[i] for i in indices])
        assert all(torch.equal(batch[name], value) for name, value in expected.items())


def test_every_rank_evaluates_as_many_batches_and_each_sample_once(
    captions: CaptionSamples,
) -> None:
    shares = [list(eval_batches(captions, batch_size=4, rank=r, world_size=2)) for r in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    supervised = sum(int((b["labels"] != IGNORE_INDEX).sum()) for share in shares for b in share)
    assert supervised == sum(
        int((captions[i]["labels"] != IGNORE_INDEX).sum()) for i in range(len(captions))
    )


def test_a_question_that_would_be_cut_is_refused(captions: CaptionSamples) -> None:
    captions.check_room()
    short = CaptionSamples(captions.split, captions.tokenizer, captions.family, 20, 10**6, "")
    with pytest.raises(ConfigError, match=r"train\.max_length=20 cuts the question"):
        short.check_room()


def test_a_cut_shard_is_named(captions: CaptionSamples, tmp_path: Path) -> None:
    data = Path(squares(tmp_path / "store").uri)
    shutil.copytree(data, tmp_path / "data")
    os.truncate(tmp_path / "data" / "images-00000.tar", 1000)
    lost = replace(captions, split=Split(Storage(str(tmp_path / "data")), "train"))
    with pytest.raises(DataError, match="images-00000.tar: no .* bytes from"):
        lost[5]


def test_ids_and_labels_are_those_of_transformers_own_processor(tmp_path: Path) -> None:
    """LlavaProcessor expands the image token; labels start where its prompt ends."""
    from PIL import Image
    from transformers import LlavaProcessor

    data = Path(squares(tmp_path, num_train=6, num_test=1).uri)
    processor = LlavaProcessor.from_pretrained(EMBEDDED)
    ours = CaptionSamples(
        Split(Storage(str(data)), "train"), processor.tokenizer,
        family_of(EMBEDDED), 2048, 10**6, "",
    )  # fmt: skip
    for index, sample in enumerate(ours.split.first(6)):
        image = Image.open(io.BytesIO(sample.pictures[0])).convert("RGB")
        prompt = f"USER: <image>\n{sample.turns[0].text} ASSISTANT:"
        whole = processor(images=image, text=f"{prompt} {sample.answer}</s>", return_tensors="pt")
        asked = processor(images=image, text=prompt, return_tensors="pt")["input_ids"][0]
        found = ours[index]
        assert found["input_ids"].tolist() == whole["input_ids"][0].tolist()
        assert (found["input_ids"] == processor.image_token_id).sum() == 196
        assert (found["labels"][: len(asked)] == IGNORE_INDEX).all()
        assert torch.equal(found["labels"][len(asked) :], whole["input_ids"][0, len(asked) :])


@pytest.mark.parametrize(
    ("name", "later"), [("cosine", [1, 0.5, 0]), ("linear", [1, 0.5, 0]), ("constant", [1, 1, 1])]
)
def test_the_rate_rises_through_the_warmup_and_then_follows_its_schedule(
    name: str, later: list[float]
) -> None:
    train = TrainConfig.model_validate({"lr_scheduler": name, "warmup_ratio": 0.03})
    factor = rate_factor(train, 42)  # 0.03 of 42 is rounded up to 2 steps.
    assert [factor(step) for step in (0, 1, 2, 22, 42)] == pytest.approx([0, 0.5, *later])
