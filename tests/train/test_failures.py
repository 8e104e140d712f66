"""What a failed training says: the errors that Ray Train hands back, without a cluster."""

import errno
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from llava_ray.config.run import TrainConfig
from llava_ray.errors import DataError, ResourceError
from llava_ray.train.trainer import fit

FULL = OSError(errno.ENOSPC, "No space left on device")


def trainer(error: Exception) -> Any:
    def fail() -> None:
        raise pickle.loads(pickle.dumps(error))

    scaling = SimpleNamespace(resources_per_worker={"CPU": 1})
    where = SimpleNamespace(storage_path="/mine")
    return SimpleNamespace(fit=fail, run_config=where, scaling_config=scaling)


@pytest.mark.parametrize(
    "error", [WorkerGroupError("rank 1 failed", {1: FULL}), ControllerError(FULL)]
)
def test_a_full_disk_is_named(error: Exception) -> None:
    with pytest.raises(ResourceError, match="no space left at /mine"):
        fit(lambda: trainer(error), TrainConfig())


def test_a_workers_own_error_is_raised() -> None:
    error = WorkerGroupError("rank 0 failed", {0: DataError("no image 7.png")})
    with pytest.raises(DataError, match=r"no image 7\.png"):
        fit(lambda: trainer(error), TrainConfig())


def test_other_failures_keep_their_traceback() -> None:
    error = WorkerGroupError("rank 0 failed", {0: ValueError("a bug")})
    with pytest.raises(WorkerGroupError, match="rank 0 failed"):
        fit(lambda: trainer(error), TrainConfig())


def test_a_controller_that_finds_no_server_is_started_again(tmp_path: Path) -> None:
    """B10: Ray Train looks at its storage first, and its actor dies where that is gone."""
    gone = ActorDiedError()
    gone.error_msg = "AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: 7"
    errors = [gone, gone]

    def fail_twice() -> Any:
        if errors:
            raise errors.pop()
        return SimpleNamespace(metrics={"loss": 1})

    def make() -> Any:
        where = SimpleNamespace(storage_path=str(tmp_path))
        scaling = SimpleNamespace(resources_per_worker={"CPU": 1})
        return SimpleNamespace(fit=fail_twice, run_config=where, scaling_config=scaling)

    assert fit(make, TrainConfig()).metrics == {"loss": 1}
    errors = [gone] * 9
    with pytest.raises(ResourceError, match="train: .*NETWORK_CONNECTION"):
        fit(make, TrainConfig())
