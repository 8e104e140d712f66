"""The llama.cpp engine against transformers on the same pixels, and its contract."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from pictures import square
from PIL import Image

from llava_ray.errors import ArtifactError, DataError, ResourceError
from llava_ray.inference.engine import Prompt
from llava_ray.models import tensors as llava_folder
from llava_ray.models.chat_template import Turn, Vicuna
from llava_ray.models.folder import EMBEDDED
from llava_ray.models.images import Pixels, normalize
from llava_ray.quantize.gguf_parity import probe_picture
from llava_ray.quantize.gguf_writer import write_pair

pytest.importorskip("llama_cpp", reason="needs 'pip install llava_ray[gguf]'")

from llava_ray.inference.llama_cpp.engine import LlamaCppEngine  # noqa: E402

CONTEXT = 512
# float32 sums in another order; logits here are near 1.
TOLERANCE = 1e-4
# Of a pair in F16, whose products, GELUs and cache are rounded to 16 bits; a patch out of place
# differs by more than 1.
F16_TOLERANCE = 5e-2


def write(target: Path, precision: str) -> Path:
    """Write the embedded model as a pair."""
    llava_folder.copy_sidecars(EMBEDDED, target)
    (target / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    names = target / f"llava-{precision}.gguf", target / f"mmproj-{precision}.gguf"
    write_pair(EMBEDDED, *names, precision=precision)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pair"), "f32")


@pytest.fixture(scope="module")
def f16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pair"), "f16")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(folder, device="cpu", slots=3, context=CONTEXT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


def prompt_of(engine: LlamaCppEngine, text: str, *images: Pixels) -> Prompt:
    tokens = engine.family.vision.tokens
    text = text.replace("<image>", "<image>" * tokens)
    pictures = tuple(square(pixels, tokens) for pixels in images)
    return Prompt(tuple(engine.tokenizer(text)["input_ids"]), pictures)


def noise(seed: int, size: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def features_of(model: Any, pixels: Pixels) -> Any:
    with torch.no_grad():
        output = model.model.get_image_features(
            pixel_values=normalize(pixels)[None], return_dict=True
        )
    return output.pooler_output[0].numpy()


@pytest.mark.parametrize(
    "make", [lambda size: noise(0, size), lambda size: np.asarray(probe_picture(size))]
)
def test_images_become_the_embeddings_of_transformers(
    make: Any, engine: LlamaCppEngine, model: Any
) -> None:
    pixels = make(engine.family.vision.image_size)
    found, expected = engine.embed_image(pixels), features_of(model, pixels)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_f16_pairs_see_every_patch_in_its_place(f16_folder: Path, model: Any) -> None:
    engine = LlamaCppEngine(f16_folder, device="cpu", slots=1, context=CONTEXT)
    pixels = noise(0, engine.family.vision.image_size)
    found, expected = engine.embed_image(pixels), features_of(model, pixels)
    prompt = prompt_of(engine, "USER: <image>\nRead. ASSISTANT:", pixels)
    logits = engine.score(prompt, [40, 41, 42])
    engine.close()
    np.testing.assert_allclose(found, expected, atol=F16_TOLERANCE)
    torch.testing.assert_close(
        logits, logits_of(model, prompt, [40, 41, 42]), atol=F16_TOLERANCE, rtol=0
    )


def test_llama_cpps_own_chat_runs_the_pair(f16_folder: Path) -> None:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    picture = io.BytesIO()
    Image.fromarray(noise(0, 64)).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    mmproj, text = f16_folder / "mmproj-f16.gguf", f16_folder / "llava-f16.gguf"
    handler = Llava15ChatHandler(clip_model_path=str(mmproj), verbose=False)
    llama = Llama(str(text), chat_handler=handler, n_ctx=512, verbose=False, n_threads=1)
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What does it say?"},
    ]
    answer = llama.create_chat_completion([{"role": "user", "content": content}], max_tokens=4)
    llama.close()
    assert answer["usage"]["prompt_tokens"] > 196
    assert answer["usage"]["completion_tokens"] > 0


def test_the_chat_template_writes_the_projects_prompt(f16_folder: Path) -> None:
    from gguf import GGUFReader

    field = GGUFReader(f16_folder / "llava-f16.gguf").get_field("tokenizer.chat_template")
    assert field is not None
    template = jinja2.Template(field.contents())
    turns = [Turn("Hi?", num_images=1, answer="A sign."), Turn("Where?")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]},
        {"role": "assistant", "content": "A sign."},
        {"role": "user", "content": "Where?"},
    ]
    found = template.render(messages=messages, add_generation_prompt=True)
    assert found == Vicuna(None).write(turns, "Be brief.", [1]).text


def logits_of(model: Any, prompt: Prompt, answer: list[int]) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([[*prompt.input_ids, *answer]])}
    if prompt.images:
        inputs["pixel_values"] = normalize(np.concatenate([image.tiles for image in prompt.images]))
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits[len(prompt.input_ids) - 1 : -1]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_scores_are_the_logits_of_transformers(
    engine: LlamaCppEngine, model: Any, images: int
) -> None:
    size = engine.family.vision.image_size
    pixels = tuple(noise(seed, size) for seed in range(images))
    prompt = prompt_of(engine, "<image>" * images + "\nWhat? ASSISTANT:", *pixels)
    answer = engine.tokenizer("a red sign", add_special_tokens=False)["input_ids"]
    found = engine.score(prompt, answer)
    assert found.dtype == torch.float32
    expected = logits_of(model, prompt, answer)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_score_is_prefill_and_decode_step_by_step(engine: LlamaCppEngine) -> None:
    prompt = prompt_of(
        engine, "USER: <image>\nRead. ASSISTANT:", noise(1, engine.family.vision.image_size)
    )
    answer = [40, 300, 41, 301, 42]
    slot, first = engine.prefill(prompt)
    rows = [first]
    rows += [engine.decode([slot], torch.tensor([token]))[0] for token in answer[:-1]]
    engine.release(slot)
    torch.testing.assert_close(
        torch.stack(rows), engine.score(prompt, answer), atol=TOLERANCE, rtol=0
    )


def test_prompts_that_end_in_an_image_are_scored_from_its_last_row(
    engine: LlamaCppEngine, model: Any
) -> None:
    prompt = prompt_of(engine, "USER: <image>", noise(2, engine.family.vision.image_size))
    expected = logits_of(model, prompt, [7, 8])
    torch.testing.assert_close(engine.score(prompt, [7, 8]), expected, atol=TOLERANCE, rtol=0)


def test_a_batch_of_unequal_lengths_decodes_as_each_alone(engine: LlamaCppEngine) -> None:
    size = engine.family.vision.image_size
    prompts = [
        prompt_of(engine, "Hi"),
        prompt_of(engine, "USER: <image>\nDescribe. ASSISTANT:", noise(3, size)),
        prompt_of(engine, "USER: <image>\nDescribe it in detail. ASSISTANT: A", noise(4, size)),
    ]
    steps = [[11, 12, 13], [300, 301, 302], [50, 60, 70]]
    alone = []
    for prompt, tokens in zip(prompts, steps, strict=True):
        slot, _ = engine.prefill(prompt)
        alone.append(
            torch.stack([engine.decode([slot], torch.tensor([token]))[0] for token in tokens])
        )
        engine.release(slot)
    slots = [engine.prefill(prompt)[0] for prompt in prompts]
    # Not in ascending order: rows must come back in the caller's.
    order = [2, 0, 1]
    for step in range(3):
        tokens = torch.tensor([steps[i][step] for i in order])
        rows = engine.decode([slots[i] for i in order], tokens)
        for row, i in zip(rows, order, strict=True):
            torch.testing.assert_close(row, alone[i][step], atol=TOLERANCE, rtol=0)
    for slot in slots:
        engine.release(slot)


def test_a_released_slot_forgets_its_sequence(engine: LlamaCppEngine) -> None:
    prompt = prompt_of(engine, "What does the sign say?")
    slot, expected = engine.prefill(prompt)
    engine.decode([slot], torch.tensor([5]))
    engine.release(slot)
    other, _ = engine.prefill(prompt_of(engine, "Something else entirely"))
    engine.release(other)
    again, found = engine.prefill(prompt)
    engine.release(again)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_an_image_asked_about_again_is_not_encoded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LlamaCppEngine(folder, device="cpu", slots=2, context=CONTEXT)
    try:
        images = [noise(seed, engine.family.vision.image_size) for seed in (1, 2, 3)]
        asked = [
            prompt_of(engine, f"USER: <image>\n{text} ASSISTANT:", image)
            for image, text in [(images[0], "What?"), (images[1], "What?"), (images[0], "Where?")]
        ]
        plain = [tokens_of(engine, prompt) for prompt in asked]
        assert plain[0] != plain[1], "the images must matter to this test"
        engine.keep_prefixes(2)
        encoded: list[Pixels] = []
        real = engine.embed_image
        monkeypatch.setattr(
            engine, "embed_image", lambda pixels: (encoded.append(pixels), real(pixels))[1]
        )
        assert [tokens_of(engine, prompt) for prompt in asked] == plain
        assert len(encoded) == 2
        # A third image drives the one out that was not asked about for longest.
        third = prompt_of(engine, "USER: <image>\nWho? ASSISTANT:", images[2])
        tokens_of(engine, third)
        assert tokens_of(engine, asked[2]) == plain[2]
        assert len(encoded) == 3
        assert tokens_of(engine, asked[1]) == plain[1]
        assert len(encoded) == 4
        engine._prefixes.max_bytes = 1
        for _ in range(2):
            tokens_of(engine, third)
        assert len(encoded) == 6, "what has no room is not kept"
    finally:
        engine.close()


def tokens_of(engine: LlamaCppEngine, prompt: Prompt) -> list[tuple[int, float]]:
    """Return greedy tokens, each with its logit."""
    slot, logits = engine.prefill(prompt)
    found = []
    for _ in range(5):
        token = int(logits.argmax())
        found.append((token, round(float(logits[token]), 4)))
        logits = engine.decode([slot], torch.tensor([token]))[0]
    engine.release(slot)
    return found


def test_logits_outlive_the_next_decode(engine: LlamaCppEngine) -> None:
    slot, _ = engine.prefill(prompt_of(engine, "One"))
    first = engine.decode([slot], torch.tensor([5]))
    kept = first.clone()
    engine.decode([slot], torch.tensor([600]))
    engine.release(slot)
    assert torch.equal(first, kept)


def test_full_slots_and_contexts_are_refused(engine: LlamaCppEngine) -> None:
    slots = [engine.prefill(prompt_of(engine, "Hi"))[0] for _ in range(engine.slots)]
    with pytest.raises(ResourceError, match="all 3 slots"):
        engine.prefill(prompt_of(engine, "Hi"))
    for slot in slots:
        engine.release(slot)
    with pytest.raises(DataError, match="at most 512"):
        engine.prefill(Prompt((5,) * (CONTEXT + 1)))
    slot, _ = engine.prefill(Prompt((5,) * CONTEXT))
    with pytest.raises(DataError, match="slot 0 is full: 512 tokens"):
        engine.decode([slot], torch.tensor([5]))
    engine.release(slot)
    with pytest.raises(DataError, match="empty"):
        engine.decode([slot], torch.tensor([5]))


def test_images_must_match_their_tokens(engine: LlamaCppEngine) -> None:
    pixels = noise(0, engine.family.vision.image_size)
    with pytest.raises(DataError, match="0 image tokens for 1 images"):
        engine.prefill(Prompt((1, 5), (square(pixels),)))
    ids = (engine.family.vision.image_token_id,) * engine.family.vision.tokens
    with pytest.raises(DataError, match="0 images"):
        engine.prefill(Prompt(ids))
    with pytest.raises(DataError, match="shape"):
        engine.prefill(Prompt(ids, (square(pixels[:-1], len(ids)),)))


def test_weight_bytes_leave_out_the_embedding(engine: LlamaCppEngine, folder: Path) -> None:
    shapes = llava_folder.weight_shapes(EMBEDDED)
    read = [
        np.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("language_model.") and "embed_tokens" not in name
    ]
    assert engine.weight_bytes() == 4 * sum(read)


def test_a_folder_without_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="mmproj"):
        LlamaCppEngine(tmp_path, device="cpu", slots=1, context=64)
