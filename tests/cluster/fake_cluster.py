"""A head without CPUs whose autoscaler starts nodes as processes of this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import yaml
from test_local_cluster import free_ports

from llava_ray.cluster.local import Head, down, up

REPO = Path(__file__).parents[2]
HEAD_NODE = "f" * 51 + "00000"


@contextmanager
def fake_cluster(
    folder: Path,
    *,
    workers: int,
    cpus: int = 1,
    comes_after_s: float = 0,
    idle_minutes: float = 0.1,
) -> Iterator[Head]:
    """Start the head, and end all in the end. Of its one node type up to `workers` come."""
    gcs, dashboard, client = free_ports(3)
    autoscaling = folder / "autoscaling.yaml"
    autoscaling.write_text(yaml.safe_dump(_autoscaling(gcs, workers, cpus, idle_minutes)))
    cluster = folder / "cluster.yaml"
    environment = (
        f"RAY_AUTH_MODE=token RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 "
        f"AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_CLOUD_INSTANCE_ID={HEAD_NODE} "
        f"FAKE_NODE_COMES_AFTER_S={comes_after_s} "
        f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={HEAD_NODE} PYTHONPATH={REPO}:{Path(__file__).parent}"
    )
    start = (
        f"ray start --head --num-cpus=0 --port={gcs} --dashboard-port={dashboard} "
        f"--ray-client-server-port={client} --dashboard-agent-listen-port=0 "
        f"--disable-usage-stats --object-store-memory=80000000 --autoscaling-config={autoscaling}"
    )
    cluster.write_text(
        yaml.safe_dump(
            {
                "cluster_name": "fake-head",
                "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
                "head_start_ray_commands": [f"{environment} {start}"],
            }
        )
    )
    try:
        yield up(cluster)
    finally:
        down(cluster)


def _autoscaling(gcs_port: int, workers: int, cpus: int, idle_minutes: float) -> dict[str, object]:
    """Return a config of Ray's provider that starts nodes as processes of this machine.

    Ray's wheel lacks the example that its own test class reads, hence the empty commands.
    """
    commands = ("setup", "head_setup", "worker_setup", "initialization")
    starts = ("head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": workers,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": "fake_nodes.FakeNodes",
            "head_node_id": HEAD_NODE,
            "gcs_address": f"{ray.util.get_node_ip_address()}:{gcs_port}",
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": cpus, "memory": 4 * 10**9, "object_store_memory": 80 * 10**6},
                "node_config": {},
                "min_workers": 0,
                "max_workers": workers,
            },
        },
        **{f"{name}_commands": [] for name in (*commands, *starts)},
        "file_mounts": {},
        "cluster_synced_files": [],
        "auth": {},
    }
