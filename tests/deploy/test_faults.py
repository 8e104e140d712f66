"""Eight clients stream while an engine, a replica or the proxy is lost, and through an upgrade.

What each fault costs is written to jobs/results/serving_faults.json; a test that always runs checks
that the file is complete.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from askers import Asker, asking, engine_pids, replica_pids, ways
from free_port import free_port
from served_variant import make_chosen

from llava_ray import deploy
from llava_ray.artifacts.code_digest import code_digest
from llava_ray.config.run import RunConfig

RESULTS = Path(__file__).parents[2] / "jobs" / "results" / "serving_faults.json"
PROXIES = ("python", "haproxy")
CLIENTS = 8
SLOTS = 4
_BEFORE_S, _PATIENCE_S = 4, 90

slow = pytest.mark.skipif("LLAVA_RAY_SLOW" not in os.environ, reason="slow: set LLAVA_RAY_SLOW=1")


class Served:
    def __init__(self, config: RunConfig) -> None:
        self.config, self.chosen = config, make_chosen(config)
        self.record = deploy.run(config, self.chosen)

    @property
    def root(self) -> str:
        return self.record.url.removesuffix("/v1")


@pytest.fixture(scope="module", params=PROXIES)
def served(
    request: pytest.FixtureRequest, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from ray import serve

    config = RunConfig.model_validate(
        {
            "storage": {"uri": str(tmp_path_factory.mktemp("faults"))},
            "serve": {
                "port": free_port(),
                "proxy": request.param,
                "cpus_per_replica": 0.5,
                "max_concurrent_requests": SLOTS,
                "max_new_tokens": 64,
                "context": 512,
            },
        }
    )
    yield Served(config)
    serve.shutdown()


def kill_engine(served: Served) -> None:
    os.kill(engine_pids()[0], signal.SIGKILL)


def stop_engine_for_20_s(served: Served) -> None:
    engine = psutil.Process(engine_pids()[0])
    engine.suspend()
    time.sleep(20)
    # It was ended meanwhile, and another answers.
    assert not engine.is_running()


def stop_engine_for_good(served: Served) -> None:
    os.kill(engine_pids()[0], signal.SIGSTOP)


def kill_replica(served: Served) -> None:
    engine = psutil.Process(engine_pids()[0])
    os.kill(replica_pids()[0], signal.SIGKILL)
    gone, _ = psutil.wait_procs([engine], timeout=5)
    assert gone, "the engine ends with its replica"


def kill_proxy(served: Served) -> None:
    listening = [
        process
        for process in psutil.Process().children(recursive=True)
        if any(
            connection.laddr.port == served.config.serve.port
            and connection.status == psutil.CONN_LISTEN
            for connection in process.net_connections("inet")
        )
    ]
    assert listening
    for process in listening:
        process.kill()


def upgrade(served: Served) -> None:
    changed = served.config.serve.model_copy(
        update={"max_new_tokens": served.config.serve.max_new_tokens + 1}
    )
    served.config = served.config.model_copy(update={"serve": changed})
    served.record = deploy.run(served.config, served.chosen)


FAULTS: dict[str, tuple[Callable[[Served], None], set[str]]] = {
    "engine killed": (kill_engine, {"whole", "cut"}),
    "engine stopped for 20 s": (stop_engine_for_20_s, {"whole", "cut"}),
    "engine stopped for good": (stop_engine_for_good, {"whole", "cut"}),
    "upgrade": (upgrade, {"whole"}),
    "replica killed": (kill_replica, {"whole", "broken", "failed"}),
    "proxy killed": (kill_proxy, {"whole", "broken", "unreachable", "failed"}),
}
"""By name: what is done, and how requests may end."""


def _recovered_s(askers: list[Asker], since: float) -> float | None:
    """Return when the first request that was sent since has ended well."""
    good = [a.ended for each in askers for a in each.asked if a.sent > since and a.how == "whole"]
    return min(good) - since if good else None


@slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_no_more_than_it_must(served: Served, fault: str) -> None:
    strike, allowed = FAULTS[fault]
    with asking(served.record.url, CLIENTS) as askers:
        time.sleep(_BEFORE_S)
        since = time.monotonic()
        strike(served)
        while (recovered_s := _recovered_s(askers, since)) is None:
            assert time.monotonic() - since < _PATIENCE_S, ways(askers)
            time.sleep(0.05)
        time.sleep(3)
    found = ways(askers)
    proxy = served.config.serve.proxy
    row = {
        "proxy": proxy, "fault": fault, "recovered_s": round(recovered_s, 1), "requests": found,
        "code_digest": code_digest("serving_faults"),
    }  # fmt: skip
    print(json.dumps(row))
    _record(row)
    later = [a for each in askers for a in each.asked if a.sent > since + 1]
    if fault != "proxy killed":
        assert {asked.how for asked in later} == {"whole"}, "what comes later waits"
    words = {asked.words for each in askers for asked in each.asked if asked.how != "whole"}
    assert set(found) <= allowed, words
    # At most what had begun, and one more where its tokens were on their way.
    assert found.get("cut", 0) <= 2 * SLOTS
    assert found.get("broken", 0) <= 2 * CLIENTS
    assert httpx.get(f"{served.root}/health", timeout=10).status_code == 200


def _record(row: dict[str, Any]) -> None:
    tree = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows = {(each["proxy"], each["fault"]): each for each in tree["rows"]}
    rows[row["proxy"], row["fault"]] = row
    tree = {"clients": CLIENTS, "slots": SLOTS, "cpus": os.cpu_count(), "rows": [*rows.values()]}
    RESULTS.write_text(json.dumps(tree, indent=1) + "\n")


def test_every_fault_is_recorded_behind_both_proxies() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert {(row["proxy"], row["fault"]) for row in rows} == {
        (proxy, fault) for proxy in PROXIES for fault in FAULTS
    }
    for row in rows:
        allowed = FAULTS[row["fault"]][1]
        assert set(row["requests"]) <= allowed and row["requests"]["whole"] > CLIENTS
