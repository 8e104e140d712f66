"""From an untrusted chat completions request to turns, images and sampling parameters."""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llava_ray.errors import DataError
from llava_ray.inference.grammar import Schemas
from llava_ray.inference.request_errors import ApiError, BadRequest, TooLarge
from llava_ray.inference.sampling import SamplingParams
from llava_ray.models.chat_template import Turn
from llava_ray.models.rgb import open_image
from llava_ray.server.settings import AppArgs

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
_ESCAPED = {"2B": "+", "2F": "/", "3D": "=", "09": "", "0A": "", "0D": "", "20": ""}
"""What is encoded of base64 where it is put into a URL."""
_SAID = {
    "union_tag_invalid": "its type is {expected_tags}, not {tag!r}",
    "too_short": "at least {min_length} is needed",
    "off": "this model cannot follow it: leave it out",
}
"""By pydantic's type of error, where its own words are about Python."""


class _Part(BaseModel):
    """A part of a request; clients send fields that they do not use as null or empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cache_control: Any = None
    """Of other servers; changes nothing here."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        named = cls.model_fields.items()
        needed = {field.alias or name for name, field in named if field.is_required()}
        sent = {name: value for name, value in fields.items() if value is not None}
        return {name: v for name, v in sent.items() if name in needed or not _is_empty(v)}


def _is_empty(value: Any) -> bool:
    """Say whether a field says nothing; LiteLLM sends dictionaries of nulls."""
    if isinstance(value, dict):
        return all(_is_empty(each) for each in value.values())
    return value is None or value in ("", [])


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """A data URL, or a URL on one of the allowed hosts."""

    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Accepted and ignored: LLaVA-1.5 sees every image at one size."""


class ImagePart(_Part):
    """An image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class Message(_Part):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        default_factory=list
    )
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    def text(self) -> str:
        """Return the text parts, one a line."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    def images(self, where: str) -> "list[ImageSource]":
        """Return the images in their order; where: what errors call the message."""
        return [
            ImageSource(part.image_url.url, f"{where}.content.{index}")
            for index, part in enumerate(self.content)
            if isinstance(part, ImagePart)
        ]


class JsonSchema(_Part):
    """A schema that the answer has to keep to, whatever `strict` says."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(_Part):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Part):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and ignored."""


class ChatRequest(_Part):
    """OpenAI's chat completions request, as far as this model can follow it."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    """0 is greedy."""
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(default=None)
    stream: bool | None = Field(default=None)
    stream_options: StreamOptions | None = Field(default=None)
    response_format: ResponseFormat | None = Field(default=None)
    logprobs: bool | None = Field(default=None)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    ignore_eos: bool | None = Field(default=None)
    """Go on to max_tokens whatever the model says; not OpenAI's, for measuring."""
    # Fields that change nothing here, accepted so that clients need no special case.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    # Fields that would change the answer: only the values that mean "off" are taken.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class ImageSource:
    """An image of a request, not read yet."""

    url: str
    where: str
    """The part that it is, such as `messages.0.content.1`."""


def parse_request(body: bytes, args: AppArgs) -> ChatRequest:
    """Validate a body.

    Raises BadRequest that names the first wrong field.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from error
    if len(request.messages) > args.max_messages:
        raise BadRequest(
            f"{len(request.messages)} messages: at most {args.max_messages} are allowed", "messages"
        )
    if len(request.stops()) > MAX_STOPS or not all(request.stops()):
        raise BadRequest(f"stop takes up to {MAX_STOPS} texts, none of them empty", "stop")
    if (request.n or 1) > args.max_choices:
        raise BadRequest(f"n={request.n}: at most {args.max_choices} choices are allowed", "n")
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs=true", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream=true", "stream_options")
    return request


def sampling_params(
    request: ChatRequest, args: AppArgs, grammar: str | None
) -> list[SamplingParams]:
    """Return how each of the choices is drawn; each has a seed of its own."""
    asked = request.max_completion_tokens or request.max_tokens or args.max_new_tokens
    top_p = 1.0 if request.top_p is None else request.top_p
    temperature = 1.0 if request.temperature is None else request.temperature
    first = SamplingParams(
        max_tokens=min(asked, args.max_new_tokens),
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p or 1.0,
        seed=request.seed,
        stop=request.stops(),
        ignore_eos=bool(request.ignore_eos),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=grammar,
    )
    if request.seed is None:
        return [first] * (request.n or 1)
    return [replace(first, seed=request.seed + index) for index in range(request.n or 1)]


async def answer_grammar(wanted: ResponseFormat | None, schemas: Schemas) -> str | None:
    """Return what answers have to keep to.

    Raises BadRequest for a schema that they cannot be kept to, Overloaded where many are compiled.
    """
    if wanted is None or wanted.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise BadRequest("response_format: json_schema is missing", "response_format")
        schema = wanted.json_schema.schema_
    try:
        return await schemas.grammar(schema)
    except DataError as error:
        where = "response_format.json_schema.schema"
        raise BadRequest(f"{where}: answers cannot be kept to it: {error}", where) from error


def read_conversation(
    messages: Sequence[Message], args: AppArgs
) -> tuple[list[Turn], list[ImageSource], str]:
    """Fold messages into turns, with their images and the system's text.

    Neighbours of one role are joined, system messages come first. Raises BadRequest for an order
    that Vicuna's format cannot hold, and for too many images.
    """
    system = [m.text() for m in messages if m.role in ("system", "developer")]
    turns: list[Turn] = []
    images: list[ImageSource] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        found = message.images(where)
        if found and message.role != "user":
            raise BadRequest("only a user's message can hold images", where)
        if message.role == "user":
            images += found
            turn = Turn(message.text(), num_images=len(found))
            if not turn.text and not found:
                raise BadRequest("the message is empty", where)
            if _open(turns):
                last = turns.pop()
                turn = Turn(f"{last.text}\n{turn.text}", last.num_images + turn.num_images)
            turns.append(turn)
        elif message.role == "assistant":
            if not turns:
                raise BadRequest("an assistant's message follows a user's", where)
            last = turns[-1]
            answer = message.text() if last.answer is None else f"{last.answer}\n{message.text()}"
            turns[-1] = Turn(last.text, last.num_images, answer)
    if not _open(turns):
        raise BadRequest("the last message must be a user's", "messages")
    if len(images) > args.max_images:
        raise BadRequest(
            f"{len(images)} images: at most {args.max_images} are allowed",
            "messages",
            "too_many_images",
        )
    return turns, images, "\n".join(system) if system else args.system_prompt


@contextmanager
def named(source: ImageSource) -> Iterator[None]:
    """Have the errors of an image say which part of the request it is."""
    try:
        yield
    except (BadRequest, TooLarge) as error:
        raise type(error)(f"{source.where}: {error}", source.where, error.code) from error


def data_url_bytes(url: str, args: AppArgs) -> bytes:
    """Return the bytes of a data URL.

    Raises TooLarge before decoding more than the limit, BadRequest for what is no base64.
    """
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _bad_image("an image's data URL reads data:image/jpeg;base64,...")
    # Line breaks and what is encoded come on top of base64's four letters for three bytes.
    if len(payload) > args.max_image_bytes * 3 // 2 + 100:
        raise TooLarge(f"an image has more than {args.max_image_bytes} bytes", "messages")
    # Some clients break lines, leave the padding out or encode it for a URL. No list of pieces is
    # made: it might take a hundred times their bytes.
    try:
        letters = payload.encode("ascii")
        for code, letter in _ESCAPED.items():
            for each in (code, code.lower()):
                letters = letters.replace(f"%{each}".encode(), letter.encode())
        letters = letters.translate(None, b" \t\r\n").rstrip(b"=")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except ValueError as error:
        raise _bad_image(f"an image's base64 is broken: {error}") from error


def decode_image(data: bytes, args: AppArgs) -> Image.Image:
    """Decode an image within the limits.

    Raises BadRequest for what is no still image of an allowed format and size.
    """
    if len(data) > args.max_image_bytes:
        raise TooLarge(f"an image has more than {args.max_image_bytes} bytes", "messages")
    try:
        return open_image(data, max_pixels=args.max_image_pixels, allow_animation=False)
    except DataError as error:
        raise _bad_image(str(error)) from error


def _bad_image(message: str) -> BadRequest:
    return BadRequest(message, "messages", "invalid_image")


def _open(turns: Sequence[Turn]) -> bool:
    return bool(turns) and turns[-1].answer is None


def _explain(error: ValidationError) -> ApiError:
    """Turn pydantic's first complaint into OpenAI's words."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    # pydantic names a part's kind, and a type of a union, as if they were fields.
    location = [
        str(part)
        for before, part in zip(("", *first["loc"]), first["loc"], strict=False)
        if not (isinstance(before, int) and part in ("text", "image_url"))
        and part not in ("str", "list[str]")
    ]
    param = ".".join(location) or None
    if kind == "json_invalid":
        return BadRequest(f"the body is not JSON ({first['msg']})")
    if kind == "extra_forbidden":
        return BadRequest(f"Unrecognized request argument supplied: {param}", param)
    if kind == "union_tag_not_found":
        kind, param = "missing", f"{param}.type"
    if kind == "missing":
        return BadRequest(f"Missing required parameter: {param}", param)
    if context.get("max_length") == 0 or context.get("expected") == "0":
        kind = "off"
    said = _SAID[kind].format(**context) if kind in _SAID else first["msg"]
    return BadRequest(f"{param}: {said}" if param else said, param)
