import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from table_engine import TableEngine

from llava_ray.errors import DataError
from llava_ray.inference.detokenize import Detokenizer, StopText
from llava_ray.inference.engine import Prompt
from llava_ray.inference.generate import generate, generate_text
from llava_ray.inference.prompts import make_prompt
from llava_ray.inference.sampling import Row, SamplingParams, sample
from llava_ray.models.chat_template import Turn

PROMPT = Prompt(input_ids=(1, 100, 101))


def _drawn(logits: torch.Tensor, params: SamplingParams, times: int) -> Counter[int]:
    row = Row(params)
    rows = [row] * times
    steps = sample(logits.expand(times, -1), rows).read()
    return Counter(step.token_id for step in steps)


def test_greedy_takes_the_argmax_of_each_row() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    steps = sample(logits, [Row(SamplingParams())] * 5).read()
    assert [s.token_id for s in steps] == logits.argmax(-1).tolist()
    assert steps[0].logprob is None


def test_sampling_draws_in_proportion_to_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    counts = _drawn(logits, SamplingParams(temperature=1.0, seed=1), 20_000)
    assert [counts[i] / 20_000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([0.6, 0.4]).log()
    counts = _drawn(logits, SamplingParams(temperature=0.5, seed=1), 20_000)
    assert counts[0] / 20_000 == pytest.approx(0.36 / 0.52, abs=0.015)


def test_top_p_keeps_the_smallest_nucleus_and_at_least_one_token() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    assert set(_drawn(logits, SamplingParams(temperature=1.0, top_p=0.7, seed=0), 500)) == {1, 2}
    assert set(_drawn(logits, SamplingParams(temperature=1.0, top_p=1e-9, seed=0), 500)) == {1}


def test_rows_of_one_batch_keep_their_own_parameters() -> None:
    logits = torch.tensor([0.4, 0.35, 0.25]).log().expand(3, -1)
    for seed in range(20):
        rows = [
            Row(SamplingParams()),
            Row(SamplingParams(temperature=1.0, seed=seed)),
            Row(SamplingParams(temperature=1.0, top_p=0.1, seed=seed)),
        ]
        alone = sample(logits[:1], [Row(SamplingParams(temperature=1.0, seed=seed))]).read()[0]
        steps = sample(logits, rows).read()
        assert [steps[0].token_id, steps[2].token_id] == [0, 0]
        assert steps[1].token_id == alone.token_id


def test_logprobs_are_the_models_own_and_sorted() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    hot = SamplingParams(temperature=9.0, seed=3, top_logprobs=2)
    step = sample(logits, [Row(hot)]).read()[0]
    assert step.logprob == pytest.approx(math.log([0.5, 0.3, 0.2][step.token_id]))
    assert [i for i, _ in step.top_logprobs] == [0, 1]
    assert step.top_logprobs[1][1] == pytest.approx(math.log(0.3))


def test_generate_frees_its_slot_when_it_ends_and_when_it_is_left() -> None:
    engine = TableEngine()
    assert len(list(generate(engine, PROMPT, SamplingParams(max_tokens=5)))) == 5
    stream = generate(engine, PROMPT, SamplingParams(max_tokens=5))
    next(stream)
    assert len(engine.held) == 1
    stream.close()
    assert engine.held == {}


def test_the_answer_ends_where_the_context_does() -> None:
    engine = TableEngine(context=10)
    done = generate_text(engine, PROMPT, SamplingParams(max_tokens=100))
    assert (len(done.token_ids), done.finish_reason) == (7, "length")


def test_the_end_token_ends_the_answer_and_is_not_part_of_it() -> None:
    engine = TableEngine()
    plain = generate_text(engine, PROMPT, SamplingParams(max_tokens=8))
    engine.eos_token_id = plain.token_ids[3]
    first = plain.token_ids.index(plain.token_ids[3])
    cut = generate_text(engine, PROMPT, SamplingParams(max_tokens=8))
    assert (cut.token_ids, cut.finish_reason) == (plain.token_ids[:first], "stop")
    on = generate_text(engine, PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    assert on.token_ids == plain.token_ids


def test_a_seed_repeats_and_stop_strings_cut() -> None:
    engine = TableEngine()
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5)
    text = generate_text(engine, PROMPT, params).text
    assert generate_text(engine, PROMPT, params).text == text
    assert generate_text(engine, PROMPT, replace(params, seed=6)).text != text
    stop = text[10:13]
    cut = generate_text(engine, PROMPT, replace(params, stop=("zzz", stop)))
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_characters_of_many_bytes_come_whole() -> None:
    engine = TableEngine()
    text = "né 你好 🙂!"
    detokenizer = Detokenizer(engine.tokenizer)
    pieces = [detokenizer.push(i) for i in engine.tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_broken_bytes_become_replacement_characters_and_hold_nothing_up() -> None:
    detokenizer = Detokenizer(TableEngine().tokenizer)
    pieces = [detokenizer.push(3 + byte) for byte in b"\xff\xff\xff\xffok\xe4"]
    assert "".join(pieces) == "\ufffd" * 4 + "ok"
    assert detokenizer.flush() == "\ufffd"


def test_stop_text_is_never_shown_in_part() -> None:
    stop = StopText(["END", "NEVER"])
    shown = [
        stop.push(piece)
        for piece in [
            "a",
            "E",
            "N",
            "x",
            "NEVE",
            "EN",
            "D",
        ]
    ]
    assert shown == ["a", "", "", "ENx", "", "NEVE", ""]
    assert stop.stopped
    held = StopText(["END"])
    assert (held.push("EN"), held.flush(), held.stopped) == ("", "EN", False)


def test_make_prompt_places_each_image_and_counts_them() -> None:
    engine = TableEngine()
    image = Image.new("RGB", (20, 10), "red")
    prompt = make_prompt(engine, "What is this? <image>", [image])
    assert prompt.input_ids.count(engine.family.vision.image_token_id) == 4
    assert prompt.images[0].tiles.shape == (1, 8, 8, 3)
    with pytest.raises(DataError, match="1 images, but 0"):
        make_prompt(engine, [Turn("hi", num_images=1)], [])
