"""Starting and updating the Serve application on the running cluster."""

import errno
import json
import logging
import os
import socket
import time
import urllib.error
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.artifacts.records import ChosenVariant, Scorecard
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import EndpointConfig, RunConfig
from llava_ray.deploy import proxy
from llava_ray.deploy.probe import fetch
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import find_fleet, serve_details
from llava_ray.resources.crash import last_line
from llava_ray.resources.memory import memory_bytes
from llava_ray.server import memory
from llava_ray.server.application import build
from llava_ray.server.settings import AppArgs, ModelArgs

logger = logging.getLogger(__name__)

APP_NAME = "llava_ray"
_LOG_EVERY_S = 10


@dataclass(frozen=True)
class Target:
    """What is to be served, and where."""

    config: RunConfig
    chosen: ChosenVariant
    store: ArtifactStore
    deployment_id: str

    @property
    def model_name(self) -> str:
        """What clients put into `model`."""
        return self.config.serve.model_name or self.chosen.slug

    @property
    def root_url(self) -> str:
        """The endpoint as this machine reaches it."""
        host = self.config.serve.host
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.config.serve.port}"

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"{self.root_url}/v1"


def ensure_served(target: Target) -> str:
    """Start or update the application unless it runs already; return its device.

    Raises ResourceError when the port is taken, no replica fits or it does not become healthy.
    """
    fleet = find_fleet(target.config)
    gpus = fleet.gpus_per_replica(target.config.serve)
    device = "cuda" if gpus else "cpu"
    if _running_deployment(target) == target.deployment_id:
        logger.info("%s is served at %s already", target.chosen.slug, target.url)
        return device
    fleet.check_replicas(target.config.serve, target.config.serve.min_replicas)
    args = _app_args(target, gpus)
    slots = _slots(args)
    if slots < args.max_concurrent_requests:
        logger.info("serve.max_concurrent_requests: there is room for %d", slots)
    application = build(args.model_copy(update={"max_concurrent_requests": slots}))
    if serve.status().proxies:
        _check_proxy(target)
    else:
        _check_address(target)
        proxy.start(target.config.serve)
    serve.run_many(
        [serve.RunTarget(application, name=APP_NAME, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    _wait_until_running(target)
    return device


def _app_args(target: Target, gpus: float) -> AppArgs:
    """Put the winner first and the variants beside it after.

    Raises ConfigError for a variant that was not measured with the winner.
    """
    endpoint, chosen = target.config.serve, target.chosen
    found = (target.store.find(Scorecard, parent) for parent in chosen.parents)
    cards = {card.slug: card for card in found if card is not None}
    for slug in endpoint.beside:
        if slug not in cards or slug == chosen.slug:
            others = ", ".join(sorted(set(cards) - {chosen.slug})) or "none"
            raise ConfigError(
                f"serve.beside: no variant {slug!r} beside the winner; there: {others}"
            )

    def model(slug: str, uri: str, name: str) -> ModelArgs:
        scorecard_uri = cards[slug].uri if slug in cards else None
        return ModelArgs(variant_uri=uri, name=name, scorecard_uri=scorecard_uri)

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return AppArgs(
        models=(
            model(chosen.slug, chosen.variant_uri, target.model_name),
            *(model(slug, cards[slug].variant_uri, slug) for slug in endpoint.beside),
        ),
        deployment_id=target.deployment_id,
        system_prompt=target.config.model.system_prompt,
        gpus_per_replica=gpus,
        surge=free.get("CPU", 0) >= endpoint.cpus_per_replica and free.get("GPU", 0) >= gpus,
        **endpoint.model_dump(include={*EndpointConfig.model_fields, "host"}),
    )


def _slots(args: AppArgs) -> int:
    """Return the answers that one replica can work on at a time, as far as nodes that are up tell.

    Raises ResourceError where its memory has no room for one.
    """
    device, kind = ("cuda", "GPU") if args.gpus_per_replica else ("cpu", "CPU")
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    fitting = [node for node in nodes if node["Alive"] and node["Resources"].get(kind)]
    if not fitting:
        return args.max_concurrent_requests
    ask = ray.remote(num_cpus=0)(memory_bytes).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(fitting[0]["NodeID"], soft=False)
    )
    _, total = ray.get(ask.remote(device))
    return memory.slots_that_fit(args, total)


def _running_deployment(target: Target) -> str | None:
    """Return the id of the deployment that answers at the target's URL, if one does."""
    key = os.environ.get(target.config.serve.api_key_env)
    try:
        fetch(f"{target.root_url}/health", key)
        models = json.loads(fetch(f"{target.url}/models", key)[0])
        deployment = models["data"][0]["deployment"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(deployment)


def _check_address(target: Target) -> None:
    """See that Serve's proxy can listen where it is to.

    Raises ResourceError when another process has the port, ConfigError for a host that is not this
    machine's.
    """
    host, port = target.config.serve.host, target.config.serve.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(
                    f"serve.host={host!r} is no address of the head node ({error.strerror}): take "
                    "127.0.0.1, 0.0.0.0 or one of its own"
                ) from error
            raise ResourceError(
                f"port {port} of {host} cannot be had ({error.strerror}): set serve.port to a free "
                "one or end what listens there"
            ) from error


def _check_proxy(target: Target) -> None:
    """Raise ResourceError where Serve listens elsewhere, or by another proxy than asked for."""
    config = target.config.serve
    running = _proxy_at(target.root_url)
    if running is None:
        raise ResourceError(
            f"this cluster's Ray Serve does not listen at {target.root_url}: give its "
            "serve.host and serve.port, or end it with 'serve shutdown -y'"
        )
    if running != config.proxy:
        raise ResourceError(
            f"this cluster's Ray Serve runs with serve.proxy={running}, not {config.proxy}: give "
            "that, or end it with 'serve shutdown -y'"
        )
    timeout_s = (serve_details().get("http_options") or {}).get("request_timeout_s")
    if timeout_s not in (None, config.request_timeout_s + proxy.SPARE_S):
        logger.warning("what finds no replica waits %g s, as Ray Serve was started", timeout_s)


def _proxy_at(root_url: str) -> str | None:
    """Return which of Ray Serve's proxies answers there, if one does."""
    try:
        body, headers = fetch(f"{root_url}/-/healthz")
    except urllib.error.HTTPError as error:
        # A proxy whose applications are still starting says so with this status.
        body, headers = b"success" if error.code == 503 else b"", error.headers
    except OSError:
        return None
    if body != b"success":
        return None
    return "python" if headers.get("server") == "uvicorn" else "haproxy"


def _wait_until_running(target: Target) -> None:
    start = logged = time.monotonic()
    wait_s = target.config.resources.wait_s
    while (state := _application_state())[0] != "RUNNING":
        status, message = state
        waited = time.monotonic() - start
        if status in ("DEPLOY_FAILED", "UNHEALTHY") or waited > wait_s:
            raise ResourceError(
                f"{target.chosen.slug} is not served after {waited:.0f} s ({status}): {message}"
            )
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            logger.info("deploy: %s for %.0f s%s", status, waited, message and f"; {message}")
        time.sleep(0.2)
    while _running_deployment(target) != target.deployment_id:
        if time.monotonic() - start > wait_s:
            raise ResourceError(f"{target.chosen.slug} runs but does not answer at {target.url}")
        time.sleep(0.2)


def _application_state() -> tuple[str, str]:
    """Return the application's status and, in one line, why it is not running."""
    application: Any = serve.status().applications.get(APP_NAME)
    if application is None:
        return "NOT_STARTED", ""
    messages = [application.message, *(d.message for d in application.deployments.values())]
    # The longest is a traceback where there is one.
    longest = max(messages, key=len)
    return application.status.value, longest and last_line(longest)
