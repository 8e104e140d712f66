"""The contract: OpenAI's own client, unchanged, against the endpoint."""

import time
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI
from PIL import Image
from table_engine import TableEngine
from web_server import Running, data_url, serving

from llava_ray.inference.generate import generate_text
from llava_ray.inference.prompts import make_prompt
from llava_ray.inference.sampling import SamplingParams


@pytest.fixture(scope="module")
def engine() -> TableEngine:
    return TableEngine(slots=4, context=512)


@pytest.fixture(scope="module")
def server(engine: TableEngine) -> Iterator[Running]:
    with serving({"tiny": engine}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def _ask(image: Image.Image | None = None, text: str = "What does the sign say?") -> list[dict]:
    content = [{"type": "text", "text": text}]
    if image is not None:
        content.append({"type": "image_url", "image_url": {"url": data_url(image)}})
    return [{"role": "user", "content": content}]


RED = Image.new("RGB", (20, 10), "red")


def test_a_plain_answer_is_the_engines_own(client: OpenAI) -> None:
    alone = TableEngine(context=512)
    prompt = make_prompt(alone, "What does the sign say?", [RED])
    expected = generate_text(alone, prompt, SamplingParams(max_tokens=12))
    answer = client.chat.completions.create(
        model="tiny", messages=_ask(RED), max_tokens=12, temperature=0
    )
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert (choice.finish_reason, choice.index) == ("length", 0)
    assert answer.usage.prompt_tokens == len(prompt.input_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + len(prompt.input_ids)


def test_the_image_reaches_the_engine(client: OpenAI) -> None:
    answers = {
        client.chat.completions.create(
            model="tiny", messages=_ask(Image.new("RGB", (9, 9), colour)), temperature=0
        )
        .choices[0]
        .message.content
        for colour in ("red", "#102030", "#a1b2c3")
    }
    assert len(answers) > 1


def test_a_stream_spells_the_plain_answer(client: OpenAI) -> None:
    asked = {"model": "tiny", "messages": _ask(RED), "max_tokens": 15, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        plain.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks][-2:] == [None, "length"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_include_usage_adds_one_chunk_without_choices(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=_ask(),
            max_completion_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(c.choices and c.usage is None for c in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_answer_before_the_stop_string(client: OpenAI, stream: bool) -> None:
    asked = {"model": "tiny", "messages": _ask(), "seed": 4, "temperature": 1.0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[20:23]
    if stream:
        chunks = list(client.chat.completions.create(**asked, stop=stop, stream=True))
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**asked, stop=["never", stop]).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_repeats_and_another_differs(client: OpenAI) -> None:
    def answer(seed: int | None) -> str:
        asked = client.chat.completions.create(
            model="tiny", messages=_ask(), seed=seed, temperature=1.0, top_p=0.9
        )
        return asked.choices[0].message.content

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_n_gives_different_choices_that_a_seed_repeats(client: OpenAI) -> None:
    asked = {"model": "tiny", "messages": _ask(), "n": 3, "seed": 1, "max_tokens": 20}
    plain = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in plain.choices]
    assert [choice.index for choice in plain.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert plain.usage.completion_tokens == 60
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs_list_each_token_and_its_rivals(client: OpenAI) -> None:
    asked = {"model": "tiny", "messages": _ask(), "max_tokens": 6, "temperature": 0}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [e.logprob for e in streamed] == [e.logprob for e in entries]
    assert streamed[0].top_logprobs == []


def test_a_conversation_with_a_system_message_and_turns(client: OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *_ask(RED),
        {"role": "assistant", "content": "STOP"},
        {"role": "user", "content": "And below it?"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    text = "Be brief. USER: ####\nWhat does the sign say? ASSISTANT: STOP</s>"
    assert answer.usage.prompt_tokens > len(text + "USER: And below it? ASSISTANT:")


def test_models_tell_digest_and_scorecard(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    one = client.models.retrieve("tiny")
    assert one.digest.startswith("sha256:")
    assert one.scorecard == {"perplexity": 2.5}
    assert one.owned_by == "llava_ray"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "error", "param", "words"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "'gpt-9' does not exist"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1 is needed"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "less than or equal to 2"),
        ({"n": 99}, openai.BadRequestError, "n", "at most 8"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", "logprobs=true"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", "cannot follow it"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop", "up to 4"),
        (
            {"extra_body": {"beam_width": 4}},
            openai.BadRequestError,
            "beam_width",
            "Unrecognized request argument supplied: beam_width",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            openai.BadRequestError,
            "messages",
            "maximum context length is 512",
        ),
    ],
)
def test_mistakes_are_named_in_openais_envelope(
    client: OpenAI, change: dict, error: type[openai.APIStatusError], param: str, words: str
) -> None:
    asked = {"model": "tiny", "messages": _ask(), **change}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**asked)
    assert words in caught.value.message
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_harmless_fields_are_taken(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=_ask(),
        max_tokens=2,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        user="someone",
        metadata={"a": "b"},
        store=False,
        tool_choice="none",
    )
    assert answer.usage.completion_tokens == 2


def test_the_client_comes_back_after_429(engine: TableEngine) -> None:
    slow = TableEngine(slots=1, context=100_000)
    with (
        serving({"tiny": slow}, max_queued_requests=1, max_concurrent_requests=1) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        running.endpoint._under_way = 2
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=_ask())
        headers = caught.value.response.headers
        assert (headers["x-should-retry"], headers["retry-after"]) == ("true", "1")
        assert caught.value.code == "queue_full"
        running.endpoint._under_way = 0
        start = time.monotonic()
        client.with_options(max_retries=2).chat.completions.create(
            model="tiny", messages=_ask(), max_tokens=2
        )
        assert time.monotonic() - start < 1


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event() -> None:
    class Breaks(TableEngine):
        def decode(self, slots, tokens):
            if self.batches[5:]:
                raise RuntimeError("device lost")
            return super().decode(slots, tokens)

    with (
        serving({"tiny": Breaks()}) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="tiny", messages=_ask(), stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="the engine stopped"):
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert len(text) >= 5
        with pytest.raises(openai.InternalServerError) as caught:
            client.get("../health", cast_to=object)
        assert caught.value.status_code == 503
        headers = caught.value.response.headers
        assert (headers["x-should-retry"], headers["retry-after"]) == ("true", "2")


def test_an_answer_past_its_deadline_is_ended() -> None:
    endless = TableEngine(slots=1, context=10_000_000)
    endless.eos_token_id = -1
    limits = {"max_new_tokens": 9_000_000, "context": 10_000_000, "request_timeout_s": 0.3}
    with (
        serving({"tiny": endless}, **limits) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=_ask())
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        assert caught.value.response.headers["x-should-retry"] == "false"
        stream = client.chat.completions.create(model="tiny", messages=_ask(), stream=True)
        with pytest.raises(openai.APIError, match="deadline passed"):
            for _ in stream:
                pass
    assert endless.held == {}


def test_hanging_up_frees_the_slot(client: OpenAI) -> None:
    endless = TableEngine(slots=1, context=1_000_000)
    with (
        serving({"tiny": endless}, max_new_tokens=900_000, context=1_000_000) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as own,
    ):
        endless.eos_token_id = -1
        stream = own.chat.completions.create(model="tiny", messages=_ask(), stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            own.with_options(timeout=0.5).chat.completions.create(model="tiny", messages=_ask())
        answer = own.chat.completions.create(model="tiny", messages=_ask(), max_tokens=2)
        assert answer.usage.completion_tokens == 2
        assert running.endpoint._under_way == 0
    assert endless.held == {}
