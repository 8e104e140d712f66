"""The engine's own forward pass against transformers' generate, and its contract."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import square

from llava_ray.errors import DataError, ResourceError
from llava_ray.inference.engine import Prompt
from llava_ray.inference.prefix_cache import PrefixKey, prefix_key
from llava_ray.inference.torch.engine import TorchEngine
from llava_ray.models.images import normalize

IMAGE_SIZE, PATCH_SIZE, IMAGE_TOKEN = 28, 7, 5
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2
VOCAB = 96
CONTEXT = 96
# float32 sums in another order: a few units in the last place of logits near 1.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> Any:
    """A random LLaVA with grouped key heads, so that their mapping is tested too."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=32,
        ),
        image_token_id=IMAGE_TOKEN,
    )
    return Llava(config).float().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder; the engine only keeps it for its users."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    )
    target = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def engine(model: Any, folder: Path) -> TorchEngine:
    return open_engine(model, folder)


def open_engine(model: Any, folder: Path, *, slots: int = 4) -> TorchEngine:
    return TorchEngine(
        copy.deepcopy(model), folder=folder, device="cpu", slots=slots, context=CONTEXT
    )


def make_prompt(length: int, *, images: int, seed: int) -> Prompt:
    """Random text around runs of image tokens."""
    rng = np.random.default_rng(seed)
    text = [int(token) for token in rng.integers(6, VOCAB, length)]
    runs = [IMAGE_TOKEN] * TOKENS_PER_IMAGE * images
    pixels = [
        square(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), TOKENS_PER_IMAGE)
        for _ in range(images)
    ]
    return Prompt((1, text[0], *runs, *text[1:]), tuple(pixels))


def plain_inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([prompt.input_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if prompt.images:
        inputs["pixel_values"] = normalize(np.concatenate([image.tiles for image in prompt.images]))
    return inputs


def plain_greedy(model: Any, prompt: Prompt, count: int) -> list[int]:
    output = model.generate(
        **plain_inputs(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return [int(token) for token in output[0, len(prompt.input_ids) :]]


def greedy(engine: TorchEngine, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """Decode all prompts in one batch, never choosing the end (as min_new_tokens does)."""
    slots, rows = [], []
    for prompt in prompts:
        slot, logits = engine.prefill(prompt)
        slots.append(slot)
        rows.append(logits)
    logits = torch.stack(rows)
    tokens = []
    for step in range(count):
        logits[:, engine.eos_token_id] = -torch.inf
        tokens.append(logits.argmax(-1))
        if step + 1 < count:
            logits = engine.decode(slots, tokens[-1])
    for slot in slots:
        engine.release(slot)
    return [[int(row[index]) for row in tokens] for index in range(len(prompts))]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_greedy_tokens_equal_plain_generate(
    model: Any, engine: TorchEngine, length: int, images: int
) -> None:
    prompt = make_prompt(length, images=images, seed=length)
    assert greedy(engine, [prompt], 12) == [plain_greedy(model, prompt, 12)]


def test_batch_of_unequal_lengths_equals_each_alone(model: Any, engine: TorchEngine) -> None:
    prompts = [
        make_prompt(3, images=0, seed=1),
        make_prompt(30, images=1, seed=2),
        make_prompt(9, images=0, seed=3),
        make_prompt(14, images=2, seed=4),
    ]
    assert greedy(engine, prompts, 16) == [plain_greedy(model, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize("images", [0, 1])
def test_logits_of_prefill_decode_and_score_equal_plain_forward(
    model: Any, engine: TorchEngine, images: int
) -> None:
    prompt = make_prompt(11, images=images, seed=7)
    continuation = [40, 41, 8, 90]
    whole = Prompt((*prompt.input_ids, *continuation), prompt.images)
    with torch.no_grad():
        plain = model(**plain_inputs(whole)).logits[0, len(prompt.input_ids) - 1 : -1]
    assert plain.std() > 0.1
    torch.testing.assert_close(
        engine.score(prompt, continuation), plain, atol=TOLERANCE, rtol=TOLERANCE
    )
    slot, first = engine.prefill(prompt)
    rows = [first] + [engine.decode([slot], torch.tensor([t]))[0] for t in continuation[:-1]]
    engine.release(slot)
    torch.testing.assert_close(torch.stack(rows), plain, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("prefixes", [0, 4])
def test_prompts_prefilled_together_are_those_given_alone(
    model: Any, folder: Path, prefixes: int
) -> None:
    engine = open_engine(model, folder, slots=5)
    prompts = [
        make_prompt(length, images=images, seed=length)
        for length, images in ((9, 1), (3, 0), (14, 2), (5, 1))
    ]
    alone = []
    for prompt in prompts:
        slot, logits = engine.prefill(prompt)
        after = engine.decode([slot], torch.tensor([7]))[0]
        engine.release(slot)
        alone.append((logits, after))
    engine.keep_prefixes(prefixes)
    if prefixes:
        engine.release(engine.prefill(prompts[3])[0])
    together = engine.prefill_together(prompts)
    slots = [slot for slot, _ in together]
    after = engine.decode(slots, torch.tensor([7] * len(slots)))
    for (_, logits), row, expected in zip(together, after, alone, strict=True):
        torch.testing.assert_close(logits, expected[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(row, expected[1], rtol=0, atol=TOLERANCE)
    with pytest.raises(ResourceError):
        engine.prefill_together(prompts[:2])
    with pytest.raises(DataError):
        engine.prefill_together([prompts[1], Prompt((1,) * (CONTEXT + 1))])
    engine.release(engine.prefill(prompts[0])[0])


def test_prefix_reuse_changes_no_token_and_tells_images_apart(model: Any, folder: Path) -> None:
    engine = open_engine(model, folder)
    engine.keep_prefixes(1)
    first = make_prompt(9, images=1, seed=5)
    question = Prompt((*first.input_ids[:-3], 60, 61), first.images)
    other = Prompt(question.input_ids, make_prompt(9, images=1, seed=6).images)
    for prompt in (first, question, other, question, first):
        assert greedy(engine, [prompt], 8) == [plain_greedy(model, prompt, 8)]


def test_prefix_reuse_skips_the_vision_tower(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(model, folder)
    engine.keep_prefixes(2)
    prompt = make_prompt(9, images=1, seed=5)
    _, before = engine.prefill(prompt)
    monkeypatch.delattr(TorchEngine, "_image_features")
    _, after = engine.prefill(prompt)
    torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=TOLERANCE)


def test_warming_up_reuses_a_prefix_and_leaves_nothing_behind(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(model, folder, slots=1)
    engine.keep_prefixes(1)
    found: list[bool] = []
    real = engine.prefixes.get

    def get(key: PrefixKey) -> Any:
        state = real(key)
        found.append(state is not None)
        return state

    monkeypatch.setattr(engine.prefixes, "get", get)
    engine._warm_prefixes()
    assert found == [False, True]
    assert not list(engine.prefixes)
    prompt = make_prompt(9, images=1, seed=5)
    assert greedy(engine, [prompt], 8) == [plain_greedy(model, prompt, 8)]


def test_prefixes_keep_to_their_bytes(model: Any, folder: Path) -> None:
    engine = open_engine(model, folder)
    engine.keep_prefixes(8)
    prompts = [make_prompt(9, images=1, seed=seed) for seed in range(3)]
    keys = [
        prefix_key(prompt, prompt.input_ids, engine.family.vision.image_token_id, 1)
        for prompt in prompts
    ]
    assert keys[0] is not None
    rows = len(keys[0].ids) * engine._cache.keys[:, 0, :, 0].numel()
    engine.prefixes.max_bytes = 2 * 2 * rows * engine._cache.keys.element_size()
    for prompt in prompts:
        engine.release(engine.prefill(prompt)[0])
    assert list(engine.prefixes) == keys[1:], "the oldest of three makes room"
    engine.prefixes.max_bytes = 1
    engine.release(engine.prefill(prompts[0])[0])
    assert list(engine.prefixes) == keys[1:], "what never fits drives nothing out"


def test_a_released_slot_is_clean(model: Any, folder: Path) -> None:
    engine = open_engine(model, folder, slots=1)
    greedy(engine, [make_prompt(40, images=1, seed=1)], 5)
    prompt = make_prompt(4, images=0, seed=2)
    assert greedy(engine, [prompt], 10) == [plain_greedy(model, prompt, 10)]


def test_no_free_slot_is_a_resource_error(model: Any, folder: Path) -> None:
    engine = open_engine(model, folder, slots=1)
    prompt = make_prompt(4, images=0, seed=2)
    slot, _ = engine.prefill(prompt)
    with pytest.raises(ResourceError, match="all 1 slots are taken"):
        engine.prefill(prompt)
    engine.release(slot)
    engine.prefill(prompt)


def test_bad_prompts_are_data_errors(engine: TorchEngine) -> None:
    image = make_prompt(3, images=1, seed=1)
    bad = {
        "at most 96 fit": make_prompt(CONTEXT, images=0, seed=1),
        "0 image tokens for 1 images": Prompt((1, 7, 8), image.images),
        "16 image tokens for 0 images": Prompt(image.input_ids),
        "empty prompt": Prompt(()),
        "image of shape": Prompt(
            image.input_ids, (square(image.images[0].tiles[0, :-1], TOKENS_PER_IMAGE),)
        ),
    }
    for message, prompt in bad.items():
        with pytest.raises(DataError, match=message):
            engine.prefill(prompt)
    for _ in range(engine.slots + 1):  # a refused prompt takes no slot
        engine.release(engine.prefill(image)[0])


def test_a_full_slot_is_a_data_error(engine: TorchEngine) -> None:
    slot, logits = engine.prefill(make_prompt(CONTEXT - 1, images=0, seed=1))
    with pytest.raises(DataError, match="slot .* is full"):
        engine.decode([slot], logits.argmax()[None])
    engine.release(slot)


def test_weight_bytes_count_what_a_token_reads(model: Any, engine: TorchEngine) -> None:
    language = model.model.language_model
    read = sum(p.numel() for p in language.parameters()) - language.embed_tokens.weight.numel()
    assert engine.weight_bytes() == 4 * (read + model.lm_head.weight.numel())
