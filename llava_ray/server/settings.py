"""The Serve application's settings: which variants, on what, within which limits."""

import os
from ipaddress import ip_address
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llava_ray.config.run import EndpointConfig
from llava_ray.config.section import Count, Natural, NotNegative, Section


class ModelArgs(Section):
    """One served variant."""

    variant_uri: str
    """Folder of a finished variant: a path or an fsspec URI; ${NAME} reads the environment."""
    name: str | None = Field(default=None)
    """What clients put into `model`; default: the variant's slug."""
    scorecard_uri: str | None = Field(default=None)
    """Folder of its scorecard, shown in /v1/models."""

    @field_validator("variant_uri")
    @classmethod
    def _expand(cls, uri: str) -> str:
        expanded = os.path.expandvars(uri)
        if "$" in expanded:
            raise ValueError(f"{uri!r}: not set where the cluster was started: write the folder")
        return expanded


class EngineArgs(Section):
    """What an engine's process opens."""

    name: str
    """What logs and the file of a crash call it."""
    variant_uri: str
    device: Literal["cpu", "cuda"]
    slots: Count
    context: Count
    kept_prefixes: Natural


class AppArgs(EndpointConfig):
    """Arguments of `build`, the Serve application."""

    models: tuple[ModelArgs, ...]
    """The first one is what the page asks by default."""
    deployment_id: str = Field(default="")
    """Shown in /v1/models, so that two deployments of the same differ."""
    gpus_per_replica: NotNegative = Field(default=0)
    """All models of a replica share them."""
    surge: bool = Field(default=False)
    """An upgrade starts new replicas before it stops the old; needs room for both."""
    host: str = Field(default="0.0.0.0")
    """Where the proxy listens; on a loopback address no API key is needed."""
    system_prompt: str = Field(default="")
    """Text before the first turn where a request has no system message."""
    max_choices: Count = Field(default=8)
    """Largest `n`."""
    max_messages: Count = Field(default=64)
    kept_prefixes: Natural = Field(default=32)
    """Images whose prefill is kept, per replica."""

    @model_validator(mode="after")
    def _check(self) -> "AppArgs":
        # Not by Field, which would also count a model that is wrong as missing.
        if not self.models:
            raise ValueError("models is empty: name at least one")
        names = [m.name for m in self.models if m.name is not None]
        if len(set(names)) != len(names):
            raise ValueError(f"models have the same name: {', '.join(names)}")
        if self.canary is not None and self.canary not in names[1:]:
            raise ValueError(f"canary {self.canary!r} is not a later one of models")
        return self

    @property
    def capacity(self) -> int:
        """Requests that one replica works on or lets wait."""
        return len(self.models) * self.max_concurrent_requests + self.max_queued_requests

    @property
    def max_body_bytes(self) -> int:
        """What a request's body may have: its images as base64, and text."""
        return self.max_images * (self.max_image_bytes * 4 // 3 + 1024) + 1_000_000

    def engine_args(self, model: ModelArgs, name: str, slots: int) -> EngineArgs:
        """Return what the process of one model's engine opens, with the slots that fit."""
        return EngineArgs(
            name=name,
            variant_uri=model.variant_uri,
            device="cuda" if self.gpus_per_replica else "cpu",
            slots=slots,
            context=self.context,
            kept_prefixes=self.kept_prefixes,
        )


def is_loopback(host: str) -> bool:
    """Say whether a host name or address never leaves this machine."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
