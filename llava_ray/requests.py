"""What a config would ask of a cluster, said before anything is asked for."""

from pathlib import Path

from llava_ray.config import RunConfig
from llava_ray.models import EMBEDDED
from llava_ray.quantize.registry import spec_for


def describe_requests(config: RunConfig) -> str:
    """Return YAML comments with the resources of each stage, assuming GPUs for GPU-sized models.

    Where the model's files are at hand, the size of each variant is estimated too.
    """
    gpu = config.model.path != "embedded"
    folder = Path(config.model.path).expanduser() if gpu else EMBEDDED
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    train, serve = config.train, config.serve
    workers = train.num_workers or "one per GPU, or 1"
    lines = [
        "# resources that the stages ask for:",
        f"# train: {workers} worker(s), {train.cpus_per_worker or 'the free'} CPUs each",
    ]
    for slug in config.quantize.variants:
        spec = spec_for(slug)
        need = spec.resources(size, gpu=gpu)
        about = f", about {spec.estimated_bytes(folder) / 1e6:,.1f} MB on disk" if size else ""
        lines.append(
            f"# quantize {slug}: {need.num_cpus:g} CPUs, {need.num_gpus:g} GPUs, "
            f"{need.memory_bytes / 2**30:.1f} GiB{about}"
        )
    lines.append(
        f"# serve: {serve.min_replicas} to {serve.max_replicas} replicas, "
        f"{serve.cpus_per_replica:g} CPUs each"
    )
    return "\n".join(lines)
