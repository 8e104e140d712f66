"""Fixtures that several stages share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not Path("/dev/nvidiactl").exists():
    # Read when Triton is imported, which several tests' modules do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One small Ray instance for the whole run."""
    import ray

    # The dashboard tells what served replicas hold.
    ray.init(address="local", num_cpus=2, include_dashboard=True, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()
