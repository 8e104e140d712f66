"""The Serve application: one deployment, whose replicas speak OpenAI's HTTP and own their engines.

Without `from __future__ import annotations`: Serve reads the type of `build`'s argument at run
time, and would silently skip its validation.
"""

import os

from ray import serve
from ray.serve import Application

from llava_ray.errors import ConfigError
from llava_ray.server.guard import key_digest
from llava_ray.server.replica import Replica
from llava_ray.server.settings import AppArgs, is_loopback

_SPARE_REQUESTS = 1024
"""What Serve lets into a replica beyond its own limit: uploads, refusals, /health, the page."""


def build(args: AppArgs) -> Application:
    """Bind the replicas.

    Raises ConfigError when the endpoint would be open to others without an API key.
    """
    deployment = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
        # A replica refuses by itself, in OpenAI's words; what waits in it counts for autoscaling.
        max_ongoing_requests=2 * args.capacity + _SPARE_REQUESTS,
        # Where no replica can take them, requests wait before all as they do in one.
        max_queued_requests=args.capacity + _SPARE_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": max(1, args.max_concurrent_requests // 2),
        },
        max_surge_percent=100 if args.surge else 0,
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=args.request_timeout_s,
    )(serve.ingress()(Replica))
    return deployment.bind(args, key_digests(args))


def key_digests(args: AppArgs) -> list[str]:
    """Return the digests of the API keys: none on a loopback address without a key.

    Raises ConfigError when the endpoint would be open to others without an API key.
    """
    key = os.environ.get(args.api_key_env, "")
    if not key and not is_loopback(args.host):
        raise ConfigError(
            f"serve.host {args.host!r} may be reached by others: set ${args.api_key_env} to an API "
            "key, or listen on 127.0.0.1"
        )
    return [key_digest(key)] if key else []
