"""What an attacker tries: without a key, from a browser, with hostile bodies, images and URLs."""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from aiohttp.abc import ResolveResult
from fastapi.routing import APIRoute
from hostile import chat_body, png_header, url_of
from PIL import Image
from table_engine import TableEngine
from web_server import Running, app_args, data_url, serving

import llava_ray
from llava_ray.artifacts.records import Variant
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.errors import ArtifactError
from llava_ray.inference.request_errors import BadRequest, TooLarge
from llava_ray.server.fetch import ImageFetcher, PublicResolver, is_public
from llava_ray.server.loading import verified_variant

KEY = "sk-correct-horse"


@pytest.fixture(scope="module")
def open_server() -> Iterator[Running]:
    with serving({"tiny": TableEngine(context=4096)}, max_image_bytes=300_000) as running:
        yield running


@pytest.fixture(scope="module")
def keyed_server() -> Iterator[Running]:
    with serving({"tiny": TableEngine()}, key=KEY) as running:
        yield running


def _post(server: Running, body: object, **options: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30, **options)


def _routes(server: Running) -> list[tuple[str, str]]:
    app = server.endpoint.app([])
    known = [route for route in app.routes if isinstance(route, APIRoute)]
    found = [(m, r.path.replace("{name:path}", "tiny")) for r in known for m in r.methods]
    assert len(known) == len(app.routes), "a route that this test does not understand"
    assert len(found) >= 6
    return found


def test_every_route_asks_for_the_key(keyed_server: Running) -> None:
    unknown = [("GET", "/docs"), ("GET", "/openapi.json"), ("OPTIONS", "/v1/models")]
    for method, path in [*_routes(keyed_server), *unknown]:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            answer = httpx.request(method, keyed_server.url + path, headers=header)
            assert answer.status_code == 401, (method, path)
            assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
    bearer = {"Authorization": f"Bearer {KEY}"}
    for method, path in _routes(keyed_server):
        body = chat_body() if method == "POST" else None
        answer = httpx.request(method, keyed_server.url + path, headers=bearer, json=body)
        assert answer.status_code == 200, (method, path)


def test_a_browser_may_give_the_key_as_a_password_but_not_for_other_sites(
    keyed_server: Running,
) -> None:
    challenge = httpx.get(keyed_server.url)
    assert challenge.headers["www-authenticate"].startswith("Basic ")
    with httpx.Client(base_url=keyed_server.url, auth=("anyone", KEY)) as browser:
        assert "<title>" in browser.get("/").text
        assert browser.post("/v1/chat/completions", json=chat_body()).status_code == 200
        foreign = browser.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert foreign.status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_without_a_key_pages_of_other_sites_are_refused(
    open_server: Running, headers: dict[str, str]
) -> None:
    for method, path in _routes(open_server):
        answer = httpx.request(method, open_server.url + path, headers=headers, json=chat_body())
        assert answer.status_code == 403, (method, path)
        assert "access-control-allow-origin" not in answer.headers


def test_the_own_page_may_ask(open_server: Running) -> None:
    own = {"Origin": open_server.url, "Sec-Fetch-Site": "same-origin"}
    assert _post(open_server, chat_body(), headers=own).status_code == 200


def test_forms_and_preflights_get_nowhere(open_server: Running) -> None:
    url = f"{open_server.url}/v1/chat/completions"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = httpx.post(url, content=json.dumps(chat_body()), headers={"Content-Type": kind})
        assert answer.status_code == 415
    preflight = httpx.options(url, headers={"Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers


def test_the_page_runs_its_own_script_only(open_server: Running) -> None:
    answer = httpx.get(open_server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "http://" not in answer.text and "https://" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_literal_image_token_in_text_is_text(open_server: Running) -> None:
    image = data_url()
    plain = _post(open_server, chat_body(image, text="a b")).json()["usage"]["prompt_tokens"]
    for text in ("<image>", "</s>", "<s>"):
        answer = _post(open_server, chat_body(image, text=text))
        # Spelled letter by letter, with a joiner of three bytes; an image would have been 4.
        expected = plain - 3 + len(text) + 3
        assert answer.json()["usage"]["prompt_tokens"] == expected
    system = {"role": "system", "content": "<image>" * 5}
    body = chat_body()
    body["messages"] = [system, *body["messages"]]
    assert _post(open_server, body).status_code == 200


def _animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def _targa() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "TGA")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        (url_of(png_header(60_000, 60_000)), 400, "pixels"),
        (url_of(png_header(2**31 - 1, 1)), 400, "pixels"),
        (url_of(png_header(100, 100)[:60]), 400, "broken image"),
        (url_of(_animation(), "gif"), 400, "animated"),
        (url_of(_targa(), "tga"), 400, "not an image"),
        (url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), 400, "not an image"),
        (url_of(b""), 400, "not an image"),
        (url_of(b"\0" * 300_001), 413, "more than 300000 bytes"),
        ("data:image/png;base64,@@@@", 400, "base64"),
        ("data:image/png,abc", 400, "data URL"),
        ("file:///etc/passwd", 400, "data URL"),
        ("http://169.254.169.254/latest/meta-data", 400, "not allowed here"),
        ("//localhost/x", 400, "data URL"),
        ("gopher://localhost/x", 400, "data URL"),
        ("http://[::1", 400, "broken"),
        ("/etc/passwd", 400, "data URL"),
    ],
)
def test_hostile_images_are_refused(
    open_server: Running, url: str, status: int, words: str
) -> None:
    answer = _post(open_server, chat_body(url))
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_more_images_than_allowed_are_refused(open_server: Running) -> None:
    body = chat_body(data_url())
    body["messages"][0]["content"] *= 9
    assert _post(open_server, body).json()["error"]["code"] == "too_many_images"


def test_a_body_is_cut_off_at_the_limit(open_server: Running) -> None:
    limit = open_server.endpoint.args.max_body_bytes

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    # The server answers and hangs up; the client may notice the second before the first.
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        answer = httpx.post(
            f"{open_server.url}/v1/chat/completions",
            content=endless(),
            headers={"Content-Type": "application/json"},
            timeout=20,
        )
        assert answer.status_code == 413
        assert str(limit) in answer.json()["error"]["message"]
    assert _post(open_server, chat_body()).status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2002:a00:1::",
    ],
)  # fmt: skip
def test_addresses_behind_the_server_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


class _Host(http.server.BaseHTTPRequestHandler):
    """An image host that also redirects, lies about sizes and never ends."""

    def do_GET(self) -> None:
        if self.path == "/image":
            self._reply(200, {}, base64.b64decode(data_url().partition(",")[2]))
        elif self.path == "/again":
            self._reply(302, {"Location": "/image"})
        elif self.path == "/loop":
            self._reply(302, {"Location": "/loop"})
        elif self.path == "/inside":
            self._reply(302, {"Location": "http://127.0.0.1:1/secret"})
        elif self.path == "/file":
            self._reply(302, {"Location": "file:///etc/passwd"})
        elif self.path == "/drip":
            self._reply(200, {})
            with contextlib.suppress(OSError):
                for _ in range(30):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
        elif self.path == "/large":
            self._reply(200, {}, b"\0" * 2_000_000)
        else:
            self._reply(404, {})

    def _reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def image_host() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


class _Resolver(PublicResolver):
    """Knows one name more, and answers once."""

    asked: ClassVar[list[str]] = []

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        if host != "pictures.test":
            return await super().resolve(host, port, socket.AF_INET)
        return [
            ResolveResult(
                hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0
            )
        ]


def _fetch(port: int, url: str) -> bytes:
    hosts = [f"pictures.test:{port}", f"127.0.0.1:{port}", f"localhost:{port}"]
    fetcher = ImageFetcher(hosts, 1_000_000, 5, _Resolver)
    return asyncio.run(fetcher(url.format(port=port)))


def test_an_allowed_host_gives_images_also_by_redirect(image_host: int) -> None:
    for path in ("/image", "/again"):
        assert _fetch(image_host, "http://pictures.test:{port}" + path).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/loop", "redirected more than 3"),
        ("/inside", "'127.0.0.1' are not allowed"),
        ("/file", "data URLs"),
        ("/missing", "status 404"),
    ],
)
def test_redirects_are_checked_anew(image_host: int, path: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        _fetch(image_host, "http://pictures.test:{port}" + path)


def test_an_allowed_name_that_points_inside_is_refused(image_host: int) -> None:
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(BadRequest, match="not on the public internet"):
            _fetch(image_host, f"http://{host}:{{port}}/image")
    with pytest.raises(BadRequest, match="not allowed"):
        _fetch(image_host, "http://pictures.test@127.0.0.1:{port}/image")


def test_a_large_remote_image_is_cut_off(image_host: int) -> None:
    with pytest.raises(TooLarge):
        _fetch(image_host, "http://pictures.test:{port}/large")


def test_the_address_is_pinned_when_the_name_changes(image_host: int) -> None:
    _Resolver.asked.clear()
    assert _fetch(image_host, "http://pictures.test:{port}/image")
    assert _Resolver.asked == ["pictures.test"]


def test_a_host_that_drips_is_left(image_host: int) -> None:
    fetcher = ImageFetcher([f"pictures.test:{image_host}"], 1_000_000, 0.5, _Resolver)
    start = time.monotonic()
    with pytest.raises(BadRequest, match="timed out"):
        asyncio.run(fetcher(f"http://pictures.test:{image_host}/drip"))
    assert time.monotonic() - start < 2


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    store = ArtifactStore(str(tmp_path))
    with store.build(Variant, "variant-x", settings={}) as build:
        (build.folder / "model.safetensors").write_bytes(b"weights")
        (build.folder / "config.json").write_text("{}")
        return build.finish(
            Variant, device="cpu", slug="none-fp16", method="none", bits_per_weight=16,
            quantize_s=1.0, peak_memory_bytes=1,
        )  # fmt: skip


def test_changed_weights_are_not_loaded(variant: Variant) -> None:
    verified_variant(variant.uri)
    (Path(variant.uri) / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError, match="model.safetensors differs"):
        verified_variant(variant.uri)


def test_files_beside_the_manifest_and_code_are_not_loaded(variant: Variant) -> None:
    (Path(variant.uri) / "README.md").write_text("The model card, written by the report.")
    verified_variant(variant.uri)
    extra = Path(variant.uri) / "modeling.py"
    extra.write_text("print('hello')")
    with pytest.raises(ArtifactError, match="modeling.py is not in the manifest"):
        verified_variant(variant.uri)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    with store.build(Variant, "variant-y", settings={}) as build:
        (build.folder / "pytorch_model.bin").write_bytes(b"pickle")
        record = build.finish(
            Variant, device="cpu", slug="none-fp16", method="none", bits_per_weight=16,
            quantize_s=1.0, peak_memory_bytes=1,
        )  # fmt: skip
    with pytest.raises(ArtifactError, match="pytorch_model.bin is not served"):
        verified_variant(record.uri)


def test_no_code_of_a_model_is_run_and_nothing_is_unpickled() -> None:
    root = Path(llava_ray.__file__).parent
    for folder in ("server", "quantize", "deploy", "models", "artifacts"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for call in ("trust_remote_code=", "pickle.load", "import pickle"):
                assert call not in text, f"{path.name}: {call}"
            for opened in text.split("torch.load(")[1:]:
                assert "weights_only=True" in opened.partition(")")[0], path.name


def test_the_arguments_name_a_canary_that_exists() -> None:
    with pytest.raises(ValueError, match="canary 'other'"):
        app_args(("a", "b"), canary="other")
