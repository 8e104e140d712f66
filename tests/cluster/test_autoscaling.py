import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray
import yaml
from test_local_cluster import free_ports

from llava_ray.cluster.local import down, up

REPO = Path(__file__).parents[2]
HEAD_NODE = "f" * 51 + "00000"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1"),
]


def fake_autoscaling(gcs_port: int, workers: int) -> dict[str, object]:
    """Return a config of Ray's provider that starts nodes as processes of this machine.

    Ray's wheel lacks the example that its own test class reads, hence the empty commands.
    """
    commands = ("setup", "head_setup", "worker_setup", "initialization")
    starts = ("head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": workers,
        "idle_timeout_minutes": 0.1,
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
                "resources": {"CPU": 1, "memory": 4 * 10**9, "object_store_memory": 80 * 10**6},
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


def test_nodes_come_the_work_spreads_and_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    gcs, dashboard, client = free_ports(3)
    autoscaling = tmp_path / "autoscaling.yaml"
    autoscaling.write_text(yaml.safe_dump(fake_autoscaling(gcs, workers=2)))
    cluster = tmp_path / "cluster.yaml"
    environment = (
        f"RAY_AUTH_MODE=token RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 "
        f"AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_CLOUD_INSTANCE_ID={HEAD_NODE} "
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
        head = up(cluster)
        captions = REPO / "tests" / "data" / "real" / "captions.jsonl"
        done = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("autoscaling_driver.py")),
                str(tmp_path / "runs"),
                str(captions),
            ],
            env={**os.environ, **head.environment(), "PYTHONPATH": str(REPO)},
            timeout=600,
            capture_output=True,
            text=True,
        )
    finally:
        down(cluster)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert (report["before"], report["most"], report["after"]) == (1, 3, 1)
    assert set(report["status"].values()) == {"ok"}, report["status"]
    assert find_spec("awq") is None, "AutoAWQ must come with its task's own environment"
    assert len(report["ran_on"]) == 5
    assert len(set(report["ran_on"].values())) == 2
    assert HEAD_NODE not in report["ran_on"].values()
