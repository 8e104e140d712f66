"""One real question about a held-out image: proof of a deployment, and its user's first command."""

import http.client
import json
import shlex
import urllib.error
import urllib.request
from email.message import Message
from typing import Any

import numpy as np

from llava_ray.artifacts.records import ChosenVariant, DatasetRecord, Scorecard
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ArtifactError, ResourceError
from llava_ray.models.dataset import open_split
from llava_ray.models.images import jpeg_url
from llava_ray.models.rgb import open_image

_SIDE = 336
"""Longest side of the image sent: what LLaVA-1.5 sees."""
MAX_TOKENS = 96


def probe_request(
    store: ArtifactStore, chosen: ChosenVariant, model_name: str, question: str, max_tokens: int
) -> bytes:
    """Return a chat completions body about the first held-out image, or of text where none is.

    Raises ArtifactError when the data set that the choice rests on is gone.
    """
    cards = (store.find(Scorecard, parent) for parent in chosen.parents)
    names = (parent for card in cards if card for parent in card.parents)
    found = (store.find(DatasetRecord, name) for name in names if name.startswith("dataset-"))
    dataset = next(filter(None, found), None)
    if dataset is None:
        raise ArtifactError(f"{chosen.id}: its data set is not at {store.storage.uri} any more")
    split = open_split(dataset, "test")
    shown = np.flatnonzero(split.num_images).tolist()
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if shown:
        small = open_image(split.read(shown[0]).pictures[0], max_pixels=10**9)
        small.thumbnail((_SIDE, _SIDE))
        url = jpeg_url(small, quality=90)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": model_name,
        "temperature": 0,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": content}],
    }
    return json.dumps(body).encode()


def ask(url: str, request: bytes, key: str | None) -> dict[str, Any]:
    """Send a request and return the answer.

    Raises ResourceError with the endpoint's own words when it refuses.
    """
    try:
        answer: dict[str, Any] = json.loads(fetch(f"{url}/chat/completions", key, request)[0])
    except urllib.error.HTTPError as error:
        reason = error.read(2000).decode(errors="replace")
        raise ResourceError(f"{url} refused a question ({error.code}): {reason}") from error
    except OSError as error:
        raise ResourceError(f"{url} does not answer: {error}") from error
    return answer


def fetch(url: str, key: str | None = None, body: bytes | None = None) -> tuple[bytes, Message]:
    """Get a URL of the endpoint, or post JSON to it; return the body and the headers.

    Raises OSError where it does not answer, of it HTTPError where it refuses.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, body, headers | {"Content-Type": "application/json"})
    # No proxy of the environment stands between this machine and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=300 if body else 10) as response:
            return response.read(), response.headers
    except http.client.HTTPException as error:
        raise ConnectionError(f"what listens there speaks no HTTP ({error!r})") from error


def curl_command(url: str, request_uri: str, *, key_env: str | None) -> str:
    """Return a command that sends the request in a file, which it reads from where that is."""
    parts = ["curl", "-s", f"{url}/chat/completions", "-H", "content-type: application/json"]
    if "://" in request_uri:
        read = f"import fsspec; print(fsspec.open({request_uri!r}, 'rt').open().read())"
        command = f"{shlex.join(['python', '-c', read])} | {shlex.join([*parts, '-d', '@-'])}"
    else:
        command = shlex.join([*parts, "-d", f"@{request_uri}"])
    # In double quotes, so that the shell puts the key in and the command does not show it.
    return f'{command} -H "authorization: Bearer ${key_env}"' if key_env else command
