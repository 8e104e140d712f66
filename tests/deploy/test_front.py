"""The wrapper that mends the HAProxy configuration that Ray writes."""

import subprocess
from pathlib import Path

from llava_ray.deploy.front import _write_wrapper

# The lines of ray/serve/_private/haproxy_templates.py that matter here.
_CONFIG = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
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
    refusal = tmp_path / "unavailable.http"
    assert lines.count(f"errorfile 503 {refusal}") == 1
    # What is mended has to stand in Ray's templates as it does here.
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    for mark in ("bind :{{", "bind *:{{", "mode 666", "    errorfile 503", '" if routes\n'):
        assert mark in template, mark


def test_a_refusal_is_in_openais_envelope(tmp_path: Path) -> None:
    import json

    _write_wrapper(tmp_path, "/bin/echo")
    head, _, body = (tmp_path / "unavailable.http").read_bytes().decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 503 ")
    assert "retry-after: 2" in head and "x-should-retry: true" in head
    assert f"content-length: {len(body)}" in head
    assert json.loads(body)["error"]["code"] == "engine_unavailable"
