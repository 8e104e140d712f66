"""What every stage will ask for and how that is known, said before anything is asked for."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError
from llava_ray.merge import merge_memory_bytes
from llava_ray.models import tensors as llava_folder
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED, check_model
from llava_ray.models.tensors import WEIGHTS, WEIGHTS_INDEX, stored_bytes
from llava_ray.prepare.readers import readers
from llava_ray.prepare.sources import SCENE_TEXT
from llava_ray.quantize.registry import spec_for
from llava_ray.resources.capacity import Resources
from llava_ray.train.estimate import DTYPE_BYTES

_CACHED_WEIGHTS = (WEIGHTS_INDEX, WEIGHTS)


@dataclass(frozen=True)
class Base:
    """What can be read of the base model without a download."""

    folder: Path | None
    """Holds all of its weights; None where some are not on this machine."""
    source: str
    """Where the figures are from, or why there are none."""
    weight_bytes: int | None = None
    """The size of its weights as they are stored; None where it is unknown."""

    def merged_bytes(self, dtype: str) -> int | None:
        """Bytes of the merged model, all weights in one dtype; of an index alone, as stored."""
        if self.folder is None:
            return self.weight_bytes
        shapes = llava_folder.weight_shapes(self.folder).values()
        return DTYPE_BYTES[dtype] * sum(math.prod(shape) for shape in shapes)


def describe_requests(config: RunConfig) -> str:
    """Return YAML comments, a line for each stage; what cannot be known is called unknown."""
    base = find_base(config)
    sources = "; ".join(_part(part.source) for part, _ in config.data.parts())
    lines = [
        "what the stages ask for, and how it is known:",
        f"prepare: the driver's own CPU; {sources}",
        *_sweep(config),
        _train(config),
        _merge(base),
        *_quantize(config, base),
        _benchmark(config),
        "choose: the driver's own CPU, for seconds",
        _deploy(config),
    ]
    return "\n".join(f"# {line}" for line in lines)


def find_base(config: RunConfig) -> Base:
    """Look for the base model on this machine: in the package, a folder or the hub's cache."""
    path = config.model.path
    named = EMBEDDED if path == "embedded" else Path(path).expanduser()
    folder = named if named.is_dir() else _cached(path, config.model.revision)
    if folder is None:
        return Base(None, f"{path} is not on this machine")
    try:
        family_of(folder)
        return _read_base(folder)
    except ConfigError as error:
        return Base(None, f"it cannot be used: {error}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Base(None, f"the model in {folder} cannot be read ({type(error).__name__})")


def _read_base(folder: Path) -> Base:
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        tree = json.loads(index.read_text(encoding="utf-8"))
        names = set(tree["weight_map"].values())
        missing = sum(not (folder / name).is_file() for name in names)
        if missing:
            why = f"{index}; {missing} of {len(names)} weight files are not on this machine"
            return Base(None, why, int(tree["metadata"]["total_size"]))
    if not index.is_file() and not (folder / WEIGHTS).is_file():
        return Base(None, f"{folder} holds no {WEIGHTS}")
    check_model(folder)
    return Base(folder, f"the headers of *.safetensors in {folder}", stored_bytes(folder))


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo, n, revision=revision) for n in _CACHED_WEIGHTS]
    except HFValidationError:
        return None
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _part(source: str) -> str:
    if source == SCENE_TEXT:
        return "scenes are drawn on it, nothing is downloaded"
    path = Path(source).expanduser()
    if path.is_file():
        size = path.stat().st_size / 1e6
        return f"{path} has {size:,.1f} MB, and the size of its images is unknown"
    if path.suffix in readers() and "://" not in source:
        return f"size unknown: {path} is not on this machine"
    return f"size unknown: {source} is read when the stage starts"


def _sweep(config: RunConfig) -> Iterator[str]:
    if config.sweep.space:
        at_once = config.sweep.max_concurrent_trials or "unknown: as many as the cluster holds"
        yield (
            f"sweep: {config.sweep.num_trials} draws (sweep.num_trials), each as train's workers; "
            f"at a time: {at_once}"
        )


def _train(config: RunConfig) -> str:
    train = config.train
    workers = (
        f"{train.num_workers} worker(s) (train.num_workers)"
        if train.num_workers
        else "workers unknown: one for each GPU of the cluster, else 1"
    )
    cpus = (
        f"{train.cpus_per_worker:g} CPUs each (train.cpus_per_worker)"
        if train.cpus_per_worker
        else "CPUs each unknown: up to 4 beside a GPU, else all that are free"
    )
    return f"train: {workers}; {cpus}; memory of a GPU: llava-ray estimate says"


def _merge(base: Base) -> str:
    if base.weight_bytes is None:
        memory = f"memory unknown: {base.source}"
    else:
        need = merge_memory_bytes(base.weight_bytes) / 2**30
        memory = f"{need:.1f} GiB on one node ({base.source}, in fp32)"
    return f"merge: {memory}; up to 8 CPUs, and a GPU where the cluster has them"


def _quantize(config: RunConfig, base: Base) -> Iterator[str]:
    merged = base.merged_bytes(config.merge.dtype)
    known, size = merged is not None, merged or 0
    if known:
        yield f"quantize: from {size / 1e9:,.2f} GB of merged weights ({base.source})"
    for slug in dict.fromkeys(config.quantize.variants):
        spec = spec_for(slug)
        without, with_gpu = (spec.resources(size, gpu=gpu) for gpu in (False, True))
        text = _text(without, known)
        if with_gpu != without:
            text += f"; with GPUs {with_gpu.num_gpus:g} GPUs, {_text(with_gpu, known)}"
        if base.folder is None:
            text += f"; {'size' if known else 'memory and size'} unknown: {base.source}"
        else:
            text += f"; about {spec.estimated_bytes(base.folder) / 1e6:,.1f} MB on disk"
        yield f"quantize {slug}: {text}"


def _text(need: Resources, known: bool) -> str:
    if not known:
        return "CPUs unknown"
    return f"{need.num_cpus:g} CPUs, {need.memory_bytes / 2**30:.1f} GiB"


def _benchmark(config: RunConfig) -> str:
    serve, benchmark = config.serve, config.benchmark
    gpu = {
        "auto": "a GPU unknown: where the cluster has them",
        "cuda": "a GPU (benchmark.device)",
        "cpu": "no GPU (benchmark.device)",
    }.get(benchmark.device, f"a device named {benchmark.device} (benchmark.device)")
    return (
        f"benchmark: a process a variant with {serve.cpus_per_replica:g} CPUs "
        f"(serve.cpus_per_replica) and {gpu}; memory unknown: what the variant takes"
    )


def _deploy(config: RunConfig) -> str:
    serve = config.serve
    gpus = (
        "GPUs each unknown: 1 where the cluster has them, shared by served variants"
        if serve.gpus_per_replica is None
        else f"{serve.gpus_per_replica:g} GPUs each (serve.gpus_per_replica)"
    )
    return (
        f"deploy: {serve.min_replicas} to {serve.max_replicas} replicas (serve.min_replicas, "
        f"serve.max_replicas) of {1 + len(serve.beside)} variant(s), {serve.cpus_per_replica:g} "
        f"CPUs each (serve.cpus_per_replica), {gpus}"
    )
