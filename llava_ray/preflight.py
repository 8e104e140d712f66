"""What can be known of a config before anything is asked of a cluster."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, VariantError, raise_all
from llava_ray.models.check import check_base
from llava_ray.prepare.sources import check_source
from llava_ray.quantize.registry import spec_for
from llava_ray.sweep.space import check_space
from llava_ray.trial_score import scorer_for

logger = logging.getLogger(__name__)


def check(config: RunConfig) -> None:
    """Raise ConfigError that lists every mistake which no section can see by itself."""
    raise_all(_checks(config))


def _checks(config: RunConfig) -> Iterator[Callable[[], object]]:
    yield lambda: check_storage(config)
    for slug in dict.fromkeys((*config.quantize.variants, *config.serve.beside)):
        yield functools.partial(spec_for, slug)
    if config.sweep.space:
        yield lambda: check_space(config)
        yield lambda: scorer_for(config)
    for part, _ in config.data.parts():
        yield functools.partial(check_source, part.source)
    folder = Path(config.model.path).expanduser()
    if config.model.path != "embedded" and folder.is_dir():
        yield lambda: check_model(config, folder)


def check_model(config: RunConfig, folder: Path) -> None:
    """Say which slugs the base model cannot have.

    Raises ConfigError for what is wrong with its files, for the baseline's slug, and for all where
    quantize.on_unsupported is `error`.
    """
    check_base(folder)
    problems = {}
    for slug in config.quantize.variants:
        try:
            spec_for(slug).check(folder)
        except VariantError as error:
            problems[slug] = str(error)
        except ConfigError:
            pass  # An unknown slug is said elsewhere.
    for slug, problem in problems.items():
        if config.quantize.on_unsupported == "strike" and slug != config.benchmark.baseline:
            logger.warning("%s cannot be made of model.path: %s", slug, problem)
        else:
            raise ConfigError(
                f"quantize.variants: {slug} cannot be made of model.path ({problem}): leave it out"
            )


def check_storage(config: RunConfig) -> None:
    """Refuse an unknown scheme, what can be no folder, and a relative path in a Ray job.

    A job's folder vanishes with it. Raises ConfigError.
    """
    uri = config.storage.uri
    storage = Storage(uri)
    if storage.is_local:
        there = next(
            path for path in (Path(storage.root), *Path(storage.root).parents) if path.exists()
        )
        if not there.is_dir():
            raise ConfigError(f"storage.uri {uri!r}: {there} is no folder; give another path")
    relative = "://" not in uri and not Path(uri).expanduser().is_absolute()
    if relative and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise ConfigError(
            f"storage.uri {uri!r} is relative, and a job's folder vanishes with it: "
            "give an absolute path or a URI"
        )
