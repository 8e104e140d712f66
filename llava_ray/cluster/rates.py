"""How fast one GPU was: from a file, or from the artifacts that a run has left."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from llava_ray.artifacts.records import AdapterCheckpoint, MergedModel, Record, Scorecard, Variant
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import Count, Positive, Section
from llava_ray.errors import ConfigError


class Rates(Section):
    """Measurements of one device; a stage without one is left out of a plan's sums."""

    accelerator: str
    """Name of the device, or a part of it."""
    how: str
    """What was measured, on what."""
    train_samples_per_s: Positive
    """Of one device."""
    train_batch_size: Count
    trained_parameters: Count
    """Whose gradients travel between workers at each step."""
    merge_s: Positive | None = Field(default=None)
    quantize_s: dict[str, float] = Field(default_factory=dict)
    """By slug."""
    benchmark_s: dict[str, float] = Field(default_factory=dict)
    """By slug."""


def read_rates(path: Path) -> Rates:
    """Read a file of rates.

    Raises ConfigError with every mistake.
    """
    try:
        return Rates.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(mistakes)}") from error


def measured_rates(uri: str) -> Rates:
    """Collect the rates of the newest run below a storage URI.

    Raises ConfigError where no training has finished there.
    """
    store = ArtifactStore(uri)
    adapters = store.latest(AdapterCheckpoint)
    if not adapters:
        raise ConfigError(f"{uri}: no finished training there to take rates from")
    adapter = adapters[-1]
    # Others were measured on other machines, or on other models.
    device = adapter.device

    def of_device(records: list[Any]) -> list[Any]:
        return [record for record in records if _device(record) == device]

    merged = of_device(store.latest(MergedModel))
    return Rates(
        accelerator=device,
        how=f"{adapter.id} and its descendants in {uri}",
        train_samples_per_s=adapter.samples_per_s / adapter.num_workers,
        train_batch_size=adapter.settings.get("batch_size", 1),
        trained_parameters=max(1, _weight_bytes(adapter) // 4),
        merge_s=merged[-1].wall_s if merged else None,
        quantize_s={v.slug: v.quantize_s for v in of_device(store.latest(Variant))},
        benchmark_s={card.slug: card.wall_s for card in of_device(store.latest(Scorecard))},
    )


def _device(record: Record) -> str:
    return record.device


def _weight_bytes(adapter: AdapterCheckpoint) -> int:
    """Return the bytes of the trained weights, which are kept in fp32."""
    weights = (e.size_bytes for name, e in adapter.files.items() if name.endswith(".safetensors"))
    return sum(weights)
