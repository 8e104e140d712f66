"""What a config would ask of a cluster, said before anything is asked for."""

from llava_ray.config import RunConfig
from llava_ray.models import EMBEDDED
from llava_ray.quantize.registry import spec_for


def describe_requests(config: RunConfig) -> str:
    """Return YAML comments with the resources of each stage, assuming GPUs for GPU-sized models."""
    gpu = config.model.path != "embedded"
    size = sum(p.stat().st_size for p in EMBEDDED.glob("*.safetensors")) if not gpu else 0
    train, serve = config.train, config.serve
    workers = train.num_workers or "one per GPU, or 1"
    lines = [
        "# resources that the stages ask for:",
        f"# train: {workers} worker(s), {train.cpus_per_worker or 'the free'} CPUs each",
    ]
    for slug in config.quantize.variants:
        spec = spec_for(slug)
        need = spec.resources(size, gpu=gpu)
        own = ", environment of its own" if spec.runtime_env() else ""
        lines.append(
            f"# quantize {slug}: {need.num_cpus:g} CPUs, {need.num_gpus:g} GPUs, "
            f"{need.memory_bytes / 2**30:.1f} GiB{own}"
        )
    lines.append(
        f"# serve: {serve.min_replicas} to {serve.max_replicas} replicas, "
        f"{serve.cpus_per_replica:g} CPUs each"
    )
    return "\n".join(lines)
