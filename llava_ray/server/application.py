"""The Serve application: an ingress that speaks OpenAI's HTTP, and one deployment per variant.

Without `from __future__ import annotations`: Serve reads the type of `build`'s argument at run
time, and would silently skip its validation.
"""

import os
from typing import Any

from ray import serve
from ray.serve import Application

from llava_ray.errors import ConfigError
from llava_ray.server.autoscaling import replicas_for_answers
from llava_ray.server.guard import key_digest
from llava_ray.server.replica import EngineReplica, Ingress
from llava_ray.server.settings import AppArgs, ModelArgs, is_loopback


def build(args: AppArgs) -> Application:
    """Bind the replicas of all models behind one ingress.

    Raises ConfigError when the endpoint would be open to others without an API key.
    """
    engines = [_engine(model, args, index) for index, model in enumerate(args.models)]
    ingress = serve.deployment(
        name="ingress",
        # As Serve's own proxies: it waits for the engines most of the time, and a tenth of a CPU
        # would keep a task that asks for a whole one from the last.
        ray_actor_options={"num_cpus": 0},
        # Above what the ingress itself lets in, so that a refusal is its own, in OpenAI's words.
        max_ongoing_requests=2 * args.capacity + 64,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.request_timeout_s,
    )(serve.ingress()(Ingress))
    return ingress.bind(args, key_digests(args), engines)


def key_digests(args: AppArgs) -> list[str]:
    """Return the digests of the API keys: none on a loopback address without a key.

    Raises ConfigError when the endpoint would be open to others without an API key.
    """
    key = os.environ.get(args.api_key_env, "")
    if not key and not is_loopback(args.host):
        raise ConfigError(
            f"serve.host {args.host!r} is open to others: set ${args.api_key_env} to an API key, "
            "or listen on 127.0.0.1"
        )
    return [key_digest(key)] if key else []


def _engine(model: ModelArgs, args: AppArgs, index: int) -> Application:
    options: dict[str, Any] = {"num_cpus": model.cpus_per_replica}
    if model.gpus_per_replica:
        options["num_gpus"] = model.gpus_per_replica
    deployment = serve.deployment(
        name=f"engine-{index}",
        ray_actor_options=options,
        max_ongoing_requests=args.max_concurrent_requests,
        max_queued_requests=args.max_queued_requests,
        autoscaling_config={
            "min_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "target_ongoing_requests": max(1, args.max_concurrent_requests // 2),
            "policy": {"policy_function": replicas_for_answers},
        },
        max_surge_percent=100 if model.surge else 0,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=args.request_timeout_s,
    )(EngineReplica)
    return deployment.bind(model, args)
