"""The HTTP routes: OpenAI's chat completions and models, health, metrics and a small page."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse

from llava_ray.inference.engine import Prompt
from llava_ray.inference.grammar import Schemas
from llava_ray.inference.prompts import make_prompt
from llava_ray.inference.request_errors import (
    ApiError,
    BadRequest,
    DeadlineExceeded,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    UnsupportedMedia,
)
from llava_ray.inference.sampling import SamplingParams
from llava_ray.server.backend import Backend
from llava_ray.server.canary import Canary
from llava_ray.server.chat import (
    ChatRequest,
    ImageSource,
    answer_grammar,
    data_url_bytes,
    decode_image,
    named,
    parse_request,
    read_conversation,
    sampling_params,
)
from llava_ray.server.fetch import ImageFetcher
from llava_ray.server.guard import Guard
from llava_ray.server.metrics import CONTENT_TYPE, scrape
from llava_ray.server.page import PAGE, PAGE_POLICY
from llava_ray.server.replies import Choice, Delta, Reply, model_object
from llava_ray.server.settings import AppArgs
from llava_ray.server.streams import Bodies, EventStream, merge, until_disconnect

_DECODERS = 2
"""Images decoded at a time: each may take some 200 MB while it is."""
_BODIES = 8
"""Of the largest size that may be on their way in at a time."""
_SMALL = 20_000
"""Bytes that are parsed, or text that is encoded, sooner than handed to a thread."""
_UNREAD_S = 2
"""After its deadline a stream's last event is still sent, to a client that reads."""


class Endpoint:
    """Answer requests from one or more served models."""

    def __init__(self, backends: Sequence[Backend], args: AppArgs) -> None:
        self.args = args
        self._backends: Mapping[str, Backend] = {b.name: b for b in backends}
        self._fetch = ImageFetcher(args.image_hosts, args.max_image_bytes)
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._schemas = Schemas()
        self._bodies = Bodies(args.max_body_bytes, together=_BODIES * args.max_body_bytes)
        self._canary: Canary | None = None
        if args.canary is not None:
            newcomer = self._backends[args.canary]
            self._canary = Canary(backends[0], newcomer, args.canary_share)
        self._under_way = 0
        slots = sum(backend.slots for backend in backends)
        self._capacity = slots + args.max_queued_requests

    def app(self, key_digests: Sequence[str]) -> FastAPI:
        """Build the ASGI application; no keys means that only this machine may ask."""
        app = FastAPI(title="llava_ray", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        for path, answer in (
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/health", self.health),
            ("/metrics", self.metrics),
            ("/", self.page),
        ):
            app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
        app.add_exception_handler(ApiError, _on_api_error)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(ClientDisconnect, _on_disconnect)
        app.add_exception_handler(Exception, _on_bug)
        app.add_middleware(Guard, key_digests=key_digests)
        return app

    async def models(self) -> dict[str, Any]:
        """List the served models."""
        return {
            "object": "list",
            "data": [self._model_object(backend) for backend in self._backends.values()],
        }

    async def model(self, name: str) -> dict[str, Any]:
        """Describe one served model."""
        return self._model_object(self._backend(name))

    async def health(self) -> dict[str, str]:
        """Say whether every model can answer."""
        for backend in self._backends.values():
            backend.engine.check()
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Return all replicas' series."""
        return Response(await scrape(), media_type=CONTENT_TYPE)

    async def page(self) -> Response:
        """Return the page that one drops an image on."""
        return HTMLResponse(PAGE, headers={"content-security-policy": PAGE_POLICY})

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        entered, response = False, None
        deadline = time.monotonic() + self.args.request_timeout_s
        self._check_load()
        try:
            async with asyncio.timeout(self.args.request_timeout_s):
                parsed = await self._read(request)
                # Not before: a slow upload is not work.
                self._check_load()
                self._under_way, entered = self._under_way + 1, True
                response = await self._chat(request, parsed, deadline)
                return response
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {self.args.request_timeout_s:g} s") from error
        finally:
            # A stream goes on after this function; it leaves when it ends.
            if entered and not isinstance(response, EventStream):
                self._leave()

    def _check_load(self) -> None:
        if self._under_way >= self._capacity:
            raise Overloaded(f"{self._under_way} requests are under way: try again later")

    def _leave(self) -> None:
        self._under_way -= 1

    async def _chat(self, request: Request, parsed: ChatRequest, deadline: float) -> Response:
        backend = self._backend(parsed.model)
        canary = self._canary if self._canary and self._canary.wants(backend) else None
        if canary is not None and parsed.seed is None:
            # Both models have to draw the same random numbers.
            parsed = parsed.model_copy(update={"seed": random.getrandbits(32)})
        grammar = await answer_grammar(parsed.response_format, self._schemas)
        samplings = sampling_params(parsed, self.args, grammar)
        return await until_disconnect(
            request.receive, self._answer(parsed, backend, samplings, canary, deadline)
        )

    async def _read(self, request: Request) -> ChatRequest:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise UnsupportedMedia("send the body with 'content-type: application/json'")
        body = await self._bodies.read(request)
        if len(body) < _SMALL:
            return parse_request(body, self.args)
        return await asyncio.to_thread(parse_request, body, self.args)

    async def _answer(
        self,
        parsed: ChatRequest,
        backend: Backend,
        samplings: Sequence[SamplingParams],
        canary: Canary | None,
        deadline: float,
    ) -> Response:
        prompt = await self._prompt(parsed, backend)
        usage = parsed.stream_options is not None and parsed.stream_options.include_usage
        reply = Reply(backend, len(prompt.input_ids), include_usage=usage)
        choices = [Choice(backend.tokenizer, sampling) for sampling in samplings]
        timeout_s = deadline - time.monotonic()
        streams = [
            _choose(backend, prompt, sampling, choice, timeout_s)
            for sampling, choice in zip(samplings, choices, strict=True)
        ]

        def done() -> None:
            if canary is not None:
                cut, ids = choices[0].was_cut, choices[0].token_ids
                canary.compare(prompt, samplings[0], ids, cut=cut, timeout_s=timeout_s)

        if parsed.stream:
            events = _events(reply, choices, merge(streams), done)
            # The first event is awaited before the headers go out, so that a refusal has a status.
            first = await anext(events)
            return EventStream(first, events, self._leave, timeout_s=timeout_s + _UNREAD_S)
        async with aclosing(merge(streams)) as items:
            async for _ in items:
                pass
        done()
        return JSONResponse(reply.whole(choices))

    async def _prompt(self, parsed: ChatRequest, backend: Backend) -> Prompt:
        turns, sources, system = read_conversation(parsed.messages, self.args)
        fetched = {}
        # Known before any is decoded.
        _check_length(len(sources) * backend.family.vision.tokens, backend)
        for source in sources:
            if source.url[:5].lower() != "data:":
                with named(source):
                    fetched[source] = await self._fetch(source.url)

        def read(source: ImageSource) -> Image.Image:
            with named(source):
                data = fetched.get(source) or data_url_bytes(source.url, self.args)
                return decode_image(data, self.args)

        def build() -> Prompt:
            images = [read(source) for source in sources]
            return make_prompt(backend, turns, images, system)

        if not sources and sum(len(turn.text) for turn in turns) < _SMALL:
            prompt = build()
        else:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._decoders, build)
        _check_length(len(prompt.input_ids), backend)
        return prompt

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            raise NotFound(
                f"The model {name[:100]!r} does not exist; served: {', '.join(self._backends)}",
                "model",
                "model_not_found",
            )
        return self._backends[name]

    def _model_object(self, backend: Backend) -> dict[str, Any]:
        return model_object(backend, deployment_id=self.args.deployment_id)


def _check_length(tokens: int, backend: Backend) -> None:
    if tokens >= backend.context:
        raise BadRequest(
            f"This model's maximum context length is {backend.context} tokens, and the "
            f"messages have {tokens}",
            "messages",
            "context_length_exceeded",
        )


async def _choose(
    backend: Backend, prompt: Prompt, sampling: SamplingParams, choice: Choice, timeout_s: float
) -> AsyncGenerator[Delta, None]:
    """Yield one choice's deltas; a stop string ends the engine's work on it."""
    answer = backend.engine.stream(prompt, sampling, timeout_s)
    async with aclosing(backend.recorder.record(len(prompt.input_ids), answer)) as chunks:
        async for chunk in chunks:
            yield choice.add(chunk)
            if choice.finish_reason is not None:
                return


async def _events(
    reply: Reply,
    choices: Sequence[Choice],
    deltas: AsyncGenerator[tuple[int, Delta], None],
    done: Callable[[], None],
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """Yield groups of chunks; the first comes with the first token."""
    opened = set()
    async with aclosing(deltas) as items:
        async for index, delta in items:
            opening = [] if index in opened else [reply.opening(index)]
            opened.add(index)
            yield opening + reply.chunks(index, delta)
    done()
    if reply.include_usage:
        yield [reply.closing(choices)]


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.envelope(), error.status, error.headers())


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    known: ApiError = NotFound(f"no route {what}")
    if error.status_code == 405:
        known = MethodNotAllowed(f"no route {what}: another method may do")
    return JSONResponse(known.envelope(), known.status, known.headers() | dict(error.headers or {}))


async def _on_disconnect(_: Request, __: Exception) -> Response:
    # Nobody reads this; 499 is what proxies log for it.
    return Response(status_code=499)


async def _on_bug(_: Request, __: Exception) -> Response:
    return await _on_api_error(_, ApiError("the server failed on this request; its log says why"))
