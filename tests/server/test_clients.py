"""The contract with clients as people have them: LangChain, LiteLLM, openai's parse, and chats."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from openai import OpenAI
from PIL import Image
from pydantic import BaseModel
from table_engine import TableEngine
from web_server import Running, data_url, serving

from llava_ray.errors import DataError
from llava_ray.inference.request_errors import Overloaded
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration

RED = Image.new("RGB", (20, 10), "red")
URL = data_url(RED)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"tiny": TableEngine(slots=4, context=512)}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def _ask(client: OpenAI, content: object, **fields: object) -> str:
    history = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(
        model="tiny", messages=history, temperature=0, **{"max_tokens": 12, **fields}
    )
    return answer.choices[0].message.content


def test_the_servers_own_message_comes_back_in(client: OpenAI) -> None:
    history = [{"role": "user", "content": "What does the sign say?"}]
    for question in ("And below?", "In what colour?"):
        answer = client.chat.completions.create(model="tiny", messages=history, max_tokens=5)
        history.append(answer.choices[0].message)
        history.append({"role": "user", "content": question})
    assert client.chat.completions.create(model="tiny", messages=history, max_tokens=5)


def test_null_and_empty_fields_are_no_mistake(client: OpenAI) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": URL, "detail": None}},
        {"type": "text", "text": "What?", "cache_control": None},
    ]
    messages = [
        {
            "role": "user", "content": parts, "tool_calls": [], "audio": None,
            "provider_specific_fields": {"refusal": None},
        }
    ]  # fmt: skip
    messages[-1]["cache_control"] = {"type": "ephemeral"}
    nothing = {"functions": None, "reasoning_effort": None, "web_search_options": {}, "top_k": None}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=3, stop="", tools=None, extra_body=nothing
    )
    assert answer.usage.completion_tokens == 3


def test_an_images_url_may_be_plain_text(client: OpenAI) -> None:
    whole = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What?"}]
    short = [{"type": "image_url", "image_url": URL}, {"type": "text", "text": "What?"}]
    assert _ask(client, short) == _ask(client, whole)


def _picture(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, "detail": ""}}


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text"}], "messages.0.content.1.text"),
        ([{"type": "text", "text": 5}], "messages.0.content.0.text"),
        ([{"type": "video_url", "video_url": "x"}], "messages.0.content.0"),
        ([{"text": "a"}], "messages.0.content.0.type"),
        ([{"type": "text", "text": "a"}, _picture("data:,x")], "messages.0.content.1"),
        ([_picture(URL), _picture("data:image/png;base64,!")], "messages.0.content.1"),
        ([_picture(URL), _picture("https://example.com/a.png")], "messages.0.content.1"),
        ([{"type": "image_url", "image_url": {}}], "messages.0.content.0.image_url.url"),
        (
            [{"type": "image_url", "image_url": {"url": URL, "detail": "huge"}}],
            "messages.0.content.0.image_url.detail",
        ),
        ([{"type": "text", "text": "a", "voice": "deep"}], "messages.0.content.0.voice"),
        (7, "messages.0.content"),
    ],
)
def test_the_part_that_is_wrong_is_named(client: OpenAI, content: object, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, content)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize("kind", ["lines", "crlf", "no padding", "url", "blanks"])
def test_base64_comes_in_many_shapes(client: OpenAI, kind: str) -> None:
    data = next(
        text
        for size in range(1, 9)
        if (text := data_url(Image.new("RGB", (size, 3), "blue"))).endswith("=")
    )
    head, payload = data.split(",")
    changed = {
        "lines": base64.encodebytes(base64.b64decode(payload)).decode(),
        "crlf": "\r\n".join(payload[i : i + 60] for i in range(0, len(payload), 60)),
        "no padding": payload.rstrip("="),
        "url": payload.replace("=", "%3D").replace("+", "%2B").replace("/", "%2F"),
        "blanks": f" {payload} ",
    }[kind]

    def answer(url: str) -> str:
        return _ask(client, [{"type": "image_url", "image_url": {"url": url}}])

    assert answer(f"{head},{changed}") == answer(data)


def test_more_tokens_than_are_left_are_cut(client: OpenAI) -> None:
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x" * 440}],
            extra_body={"ignore_eos": True, limit: 4096},
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.total_tokens <= 512


def test_top_p_0_is_greedy(client: OpenAI) -> None:
    greedy = _ask(client, "What?")
    messages = [{"role": "user", "content": "What?"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=1, top_p=0, max_tokens=12
    )
    assert answer.choices[0].message.content == greedy


def test_a_chat_has_several_pictures_as_far_as_the_context_goes(client: OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": URL}}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A field."},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "And these?"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    alone = client.chat.completions.create(model="tiny", messages=messages[:1], max_tokens=3)
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens + 2 * 4
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        _ask(client, [picture, {"type": "text", "text": "x" * 600}])


def test_langchain_asks_about_an_image_and_streams(server: Running) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="unused", temperature=0, max_tokens=9
    )
    for url in (URL, {"url": URL}):
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
        message = HumanMessage(content=parts)
        answer = model.invoke([message])
        assert answer.content == "".join(chunk.content for chunk in model.stream([message]))
        again = model.invoke([message, answer, HumanMessage("And?")])
        assert again.usage_metadata["output_tokens"] == 9


def test_litellm_asks_about_an_image_and_streams(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Read when it is imported; else it looks for prices on the internet.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    asked = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "unused",
        "temperature": 0,
        "max_tokens": 9,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What?"},
                    {"type": "image_url", "image_url": {"url": URL}},
                ],
            }
        ],
    }
    answer = litellm.completion(**asked)
    chunks = [
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)
    ]
    assert answer.choices[0].message.content == "".join(chunks)
    history = [*asked["messages"], answer.choices[0].message, {"role": "user", "content": "And?"}]
    assert litellm.completion(**asked | {"messages": history}).usage.completion_tokens == 9


class Sign(BaseModel):
    kind: Literal["stop", "exit"]
    lit: bool
    height_m: int


@pytest.fixture(scope="module", params=["none-fp32", "gguf-f16"])
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenAI]:
    """Serves the embedded model by one of the engines."""
    spec = spec_for(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    spec.quantize(EMBEDDED, folder, Calibration(dataset_uri="", num_samples=0), "cpu")
    engine = spec.open_engine(folder, device="cpu", slots=3, context=512)
    with (
        serving({"tiny": engine}, max_new_tokens=200) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


PICTURE = [
    {"type": "image_url", "image_url": {"url": URL}},
    {"type": "text", "text": "Describe this image in detail."},
]


@pytest.mark.parametrize("temperature", [0, 1])
def test_pydantic_models_are_parsed(real: OpenAI, temperature: float) -> None:
    answer = real.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": PICTURE}],
        response_format=Sign,
        temperature=temperature,
        n=3,
        seed=5,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Sign)


def test_a_schema_is_kept_to_in_a_stream_beside_free_answers(real: OpenAI) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def free(_: int) -> str:
        return _ask(real, PICTURE, max_tokens=40)

    def streamed(_: int) -> str:
        with real.chat.completions.stream(
            model="tiny",
            messages=[{"role": "user", "content": PICTURE}],
            response_format=Sign,
            temperature=0,
        ) as stream:
            return stream.get_final_completion().choices[0].message.content

    alone = free(0), streamed(0)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda i: (free, streamed)[i % 2](i), range(6)))
    assert together == list(alone) * 3
    assert Sign.model_validate_json(alone[1])


def test_any_json_object_can_be_asked_for(real: OpenAI) -> None:
    answer = real.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Go on."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=100,
    )
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_schema_of_one_value_gives_it(real: OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": None}}}
    assert _ask(real, "What?", response_format=wanted) == "null"


def test_log_probabilities_spell_the_answer(real: OpenAI) -> None:
    messages = [{"role": "user", "content": PICTURE}]
    choice = real.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, temperature=0, logprobs=True
    ).choices[0]
    assert choice.message.content
    assert "".join(t.token for t in choice.logprobs.content) == choice.message.content


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"enum": []}, "anyOf is empty"),
        ({"$ref": "#"}, "no text keeps to it"),
        ({"type": "integer", "multipleOf": 123456789}, "to compile: simplify"),
        ([], "should be an object"),
        (None, "Missing required parameter"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(
    client: OpenAI, schema: object, words: str
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, "What?", response_format=wanted)
    assert words in caught.value.message
    assert caught.value.param == "response_format.json_schema.schema"


def test_a_temperature_of_next_to_nothing_is_greedy(real: OpenAI) -> None:
    greedy = _ask(real, PICTURE)
    for temperature in (1e-38, 1e-320, 1e-6):
        answer = real.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PICTURE}],
            temperature=temperature,
            max_tokens=12,
        )
        assert greedy.startswith(answer.choices[0].message.content[:4])


def test_schemas_are_compiled_once_and_slow_ones_let_others_by() -> None:
    from llava_ray.inference import grammar as module

    slow = {"type": "integer", "multipleOf": 999983}
    compiled: list[object] = []

    async def ask_all() -> list[object]:
        schemas = module.Schemas()
        await schemas.grammar({"type": "object"})
        many = [asyncio.create_task(schemas.grammar(slow)) for _ in range(6)]
        others = [asyncio.create_task(schemas.grammar({"const": i})) for i in range(20)]
        await asyncio.sleep(0)
        start = time.monotonic()
        assert await schemas.grammar({"type": "object"})
        assert time.monotonic() - start < 1
        return await asyncio.gather(*many, *others, return_exceptions=True)

    real_compile = module.json_grammar
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "json_grammar", lambda schema: compiled.append(schema) or real_compile(schema)
        )
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            found = loop.run_until_complete(ask_all())
    assert compiled.count(slow) == 1
    assert all(isinstance(each, DataError) for each in found[:6])
    refused = [each for each in found if isinstance(each, Overloaded)]
    assert len(refused) == 20 - (module._MOST_WAITING - 1)
