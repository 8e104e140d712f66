"""The Serve application as `serve run serve/config.yaml` imports it."""

from llava_ray.server.application import build

__all__ = ["build"]
