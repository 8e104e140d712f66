"""What can be known of a config before anything is asked of a cluster."""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llava_ray.artifacts.storage import Storage
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, VariantError, raise_all, said_by
from llava_ray.models.check import check_base, check_tokenizer, read_config
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED, cached_folder, check_weights
from llava_ray.models.low_bits import check_groups
from llava_ray.models.tensors import is_linear, module_name, weight_shapes
from llava_ray.prepare.sources import check_source
from llava_ray.quantize.registry import spec_for
from llava_ray.report.passport import refusals
from llava_ray.sweep.objective import Objective
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
    yield lambda: check_readers(config, config.quantize.variants)
    if config.sweep.space:
        yield lambda: check_space(config)
        yield lambda: scorer_for(config)
    for part, _ in config.data.parts():
        yield functools.partial(check_source, part.source)
    yield lambda: check_model(config, cached_folder(config.model))


def check_readers(config: RunConfig, slugs: Sequence[str]) -> None:
    """Raise ConfigError where none of these variants opens in all of choose.must_open_in."""
    readers = config.choose.must_open_in
    refused = {slug: refusals(slug, readers) for slug in slugs}
    if slugs and all(refused.values()):
        each = "; ".join(f"{slug}: {reasons[0]}" for slug, reasons in refused.items())
        raise ConfigError(f"choose.must_open_in: no variant opens in all of them ({each})")


_KNOWN = (family_of, check_weights, read_config, check_tokenizer)
"""What says all that settings are held against."""


def check_model(config: RunConfig, folder: Path | None) -> None:
    """Say which slugs the base model cannot have; None: it is not on this machine yet.

    Raises ConfigError that lists what is wrong with its files, and which settings it cannot take.
    """
    if folder is None or folder == EMBEDDED:
        return
    mistakes = [*said_by([functools.partial(check_base, folder)])]
    # What the settings come to is known where shapes and tokens are.
    if not mistakes or not [*said_by(functools.partial(look, folder) for look in _KNOWN)]:
        looks = (check_slugs, check_training, check_context)
        mistakes += said_by(functools.partial(look, config, folder) for look in looks)
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def check_slugs(config: RunConfig, folder: Path) -> None:
    """Say which of quantize.variants the base model cannot have.

    Raises ConfigError for those of serve.beside and sweep.objective, for the baseline, and for all
    where quantize.on_unsupported is `error`.
    """
    refused, left = [], list[str]()
    needed = {config.benchmark.baseline, *config.serve.beside}
    if config.sweep.space:
        needed |= {Objective.parse(config.sweep.objective).slug or config.benchmark.baseline}
    for slug in dict.fromkeys((*config.quantize.variants, *sorted(needed))):
        try:
            spec_for(slug).check(folder)
        except VariantError as error:
            if config.quantize.on_unsupported == "strike" and slug not in needed:
                logger.warning("%s cannot be made of model.path: %s", slug, error)
            else:
                refused.append(f"{slug} cannot be made of model.path ({error}): leave it out")
        except ConfigError:
            pass  # An unknown slug is said elsewhere.
        else:
            left += [slug] if slug in config.quantize.variants else []
    if refused:
        raise ConfigError(f"quantize.variants: {'; '.join(refused)}")
    baseline = config.benchmark.baseline
    if not config.choose.may_choose_baseline:
        left = [slug for slug in left if slug != baseline]
    if not left and any(slug != baseline for slug in config.quantize.variants):
        raise ConfigError(
            "quantize.variants: none but the baseline can be made of model.path: name others, or "
            "set choose.may_choose_baseline=true"
        )
    check_readers(config, left)


def check_training(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError where the base model's linear layers are not as the train section says."""
    train, tokens = config.train, family_of(folder).vision.tokens
    if train.max_length <= tokens:
        raise ConfigError(
            f"train.max_length={train.max_length}: a picture alone takes {tokens} tokens"
        )
    most = family_of(folder).max_image_tokens
    if train.max_length <= most:
        logger.warning(
            "train.max_length=%d: rows whose picture takes more tokens end the training, and one "
            "takes up to %d", train.max_length, most,
        )  # fmt: skip
    linears = {
        module: shape
        for name, shape in weight_shapes(folder).items()
        if is_linear(module := module_name(name.removesuffix(".weight")), vision=False)
    }
    known = {module.rpartition(".")[2] for module in linears}
    unknown = [name for name in train.lora_targets if name not in known]
    if unknown and train.method != "full":
        raise ConfigError(
            f"train.lora_targets {unknown[0]!r}: the language model has no such linear layer; it "
            f"has {', '.join(sorted(known))}"
        )
    if train.method == "hqq":
        for module, shape in linears.items():
            try:
                check_groups(module, shape, bits=train.hqq_bits, group_size=train.hqq_group_size)
            except ValueError as error:
                raise ConfigError(f"train.hqq_group_size: {error}") from error


def check_context(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError where no picture, and say where not every picture, fits serve.context."""
    family, context = family_of(folder), config.serve.context
    if context <= family.vision.tokens:
        raise ConfigError(
            f"serve.context={context}: a picture alone takes {family.vision.tokens} tokens"
        )
    if context <= family.max_image_tokens:
        logger.warning(
            "serve.context=%d: requests whose picture takes more tokens are refused, and one takes "
            "up to %d", context, family.max_image_tokens,
        )  # fmt: skip


def check_storage(config: RunConfig) -> None:
    """Refuse an unknown scheme, what can be no folder, and a relative path in a Ray job.

    A job's folder vanishes with it. Raises ConfigError.
    """
    uri = config.storage.uri
    storage = Storage(uri)
    if storage.is_local:
        root = Path(storage.root)
        there = next(path for path in (root, *root.parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"storage.uri {uri!r}: {there} is no folder; give another path")
    relative = "://" not in uri and not Path(uri).expanduser().is_absolute()
    if relative and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise ConfigError(
            f"storage.uri {uri!r} is relative, and a job's folder vanishes with it: "
            "give an absolute path or a URI"
        )
