"""A small Ray cluster on this machine whose parts can be lost: processes, nodes, head, network.

A node is killed as a machine is: all of it at once. Its first processes carry its name in their
environment; Ray's workers overwrite theirs with their titles, so they are known by their parents.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drill_network import INTERFACE, Network

from llava_ray.cluster import local
from llava_ray.errors import ResourceError

if TYPE_CHECKING:
    import psutil

REPOSITORY = Path(__file__).parents[2]
NODE = "LLAVA_RAY_DRILL_NODE"
HEAD = "head"
SETTINGS = {
    # A node is dead after three missed answers, and a worker node waits for its head as long as
    # KubeRay lets it.
    "health_check_period_ms": 2000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": 600,
}
"""Of Ray, given to every node."""
RAYS_OWN = "_AutoscalingCoordinatorActor"
"""One per cluster, which Ray Train starts and which stays by design."""
ENGINE = "llava_ray.server.loading"
"""In the command of an engine's process, the child of a replica."""
OBJECT_STORE_BYTES = 100_000_000
_LOST_S = 90.0
_AGENTS_S = 60.0


class DrillCluster:
    """A head that runs no task, and worker nodes with one CPU each."""

    def __init__(self, network: Network | None, *, redis: bool) -> None:
        self.network = network
        # Short, since a socket's path below it has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="drill-"))
        self.head_ip = network.head_ip if network else "127.0.0.1"
        self.addresses = {HEAD: self.head_ip}
        """Of the nodes that are not lost."""
        port, dashboard, self._client_port, self.redis_port, self.serve_port = free_ports(5)
        self.head = local.Head(
            cluster_id=secrets.token_hex(8),
            address=f"{self.head_ip}:{port}",
            dashboard=f"http://127.0.0.1:{dashboard}",
            token_path=str(local.token_file(self.folder)),
            log_path=str(self.folder / "head.log"),
        )
        self._known: dict[psutil.Process, str] = {}
        self._by_id: dict[int, str] = {}
        self._redis: subprocess.Popen[bytes] | None = None
        self._password = secrets.token_hex(16) if redis else None

    def start(self, nodes: tuple[str, ...]) -> None:
        """Start Redis where it is wanted, the head, and nodes of these names.

        Raises ResourceError for what does not start.
        """
        if self.network:
            self.network.create()
        if self._password:
            self._start_redis(self._password)
        self.start_head()
        for name in nodes:
            self.start_node(name)
        # Until then the memory that a cluster takes by itself is not known.
        wait_for(lambda: self._agents() > len(nodes), _AGENTS_S, "Ray's agents have not started")

    def start_head(self) -> None:
        """Start the head, or start it again at the same address."""
        port, dashboard = (
            url.rpartition(":")[2] for url in (self.head.address, self.head.dashboard)
        )
        redis = ""
        store = ""
        if self._password:
            redis = f"RAY_REDIS_ADDRESS=127.0.0.1:{self.redis_port} "
            store = f" --redis-password={self._password}"
        command = (
            f"{redis}{_environment(HEAD)} ray start --head --num-cpus=0 --port={port} "
            f"--node-ip-address={self.head_ip} --dashboard-host=127.0.0.1 "
            f"--dashboard-port={dashboard} --ray-client-server-port={self._client_port} "
            f"--temp-dir={self.folder / 'r'}{store} {_COMMON}"
        )
        local.start(self.head, [f"RAY_external_storage_namespace={self.head.cluster_id} {command}"])

    def start_node(self, name: str) -> None:
        """Start a worker node, as an autoscaler would in a lost one's place."""
        address, enter, interface = self.head_ip, "", "lo"
        if self.network:
            address = self.network.add(name)
            enter = f"nsenter --net=/run/netns/{self.network.space(name)} "
            interface = INTERFACE
        self.addresses[name] = address
        command = (
            f"{_environment(name)} GLOO_SOCKET_IFNAME={interface} {enter}ray start "
            f"--address={self.head.address} --node-ip-address={address} --num-cpus=1 {_COMMON}"
        )
        local.start(replace(self.head, log_path=str(self.folder / f"{name}.log")), [command])

    def stop(self) -> None:
        """End every process, and take the networks and the folder away."""
        self._kill(None)
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()
        if self.network:
            self.network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def client_environment(self) -> dict[str, str]:
        """Return the environment of a driver on the head."""
        environment = {**os.environ, **self.head.environment(), local.MARK: self.head.cluster_id}
        environment |= {NODE: HEAD, "PYTHONPATH": str(REPOSITORY), "RAY_DEDUP_LOGS": "0"}
        environment.pop("RAY_AUTH_TOKEN", None)
        return environment

    def processes(self, node: str | None = None) -> dict["psutil.Process", str]:
        """Return the cluster's living processes, or one node's, with their titles."""
        import psutil

        found = {}
        for process, place in self._places().items():
            try:
                if node in (None, place):
                    found[process] = " ".join(process.cmdline()).strip()
            except (psutil.Error, OSError):
                continue
        return found

    def working(self, *titles: str) -> dict["psutil.Process", str]:
        """Return the processes at work whose title holds one of these, with the node of each."""
        places = self._places()
        return {
            process: places[process]
            for process, title in self.processes().items()
            if process in places and is_work(title) and any(part in title for part in titles)
        }

    def kill(self, node: str) -> list[str]:
        """Kill all of a node at once; return the titles of the work that went with it."""
        gone = self._kill(node)
        if node == HEAD:
            # A new machine does not know that file; with it Ray takes its nodes for a running head.
            (self.folder / "r" / "ray_current_cluster").unlink(missing_ok=True)
        return sorted({title for title in gone.values() if is_work(title)})

    def wait_until_dead(self, node: str) -> float:
        """Wait until the head has given a node up; return how many seconds that took.

        Raises ResourceError when it never does.
        """
        del self.addresses[node]
        start = time.monotonic()
        while time.monotonic() - start < _LOST_S:
            alive = sum(n["state"] == "ALIVE" for n in self.api("nodes"))
            if 0 < alive <= len(self.addresses):
                return time.monotonic() - start
            time.sleep(0.5)
        raise ResourceError(f"the head has not given {node} up after {_LOST_S:.0f} s")

    def actors(self) -> list[str]:
        """Return the class and state of every actor that is not dead, but for Ray's own."""
        return sorted(
            f"{a['class_name']} {a['state']}"
            for a in self.api("actors")
            if a["state"] != "DEAD" and a["class_name"] != RAYS_OWN
        )

    def memory_bytes(self) -> int:
        """Return the cluster's memory, pages that processes share counted once (PSS).

        Without RAYS_OWN, which comes with the first training and takes 120 MB.
        """
        import psutil

        total = 0
        for process, title in self.processes().items():
            with suppress(psutil.Error, OSError):
                total += 0 if RAYS_OWN in title else process.memory_full_info().pss
        return total

    def api(self, kind: str) -> list[dict[str, Any]]:
        """List `nodes` or `actors` through the head's state API; nothing while it is away."""
        body = self.request("GET", f"/api/v0/{kind}?limit=1000&detail=True")
        listed: list[dict[str, Any]] = json.loads(body)["data"]["result"]["result"] if body else []
        return listed

    def request(self, method: str, path: str) -> bytes | None:
        """Ask the head's dashboard with the token; None where it does not answer."""
        token = Path(self.head.token_path).read_text(encoding="utf-8")
        request = urllib.request.Request(
            f"{self.head.dashboard}{path}",
            method=method,
            headers={"Authorization": f"Bearer {token}"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as response:
                body: bytes = response.read()
                return body
        except OSError:
            return None

    def _agents(self) -> int:
        titles = self.processes().values()
        return sum(title.startswith("ray::DashboardAgent") for title in titles)

    def _places(self) -> dict["psutil.Process", str]:
        """Return the node of each living process; none for what runs beside the cluster."""
        import psutil

        found = {}
        # In the order of their ids, so that parents come before their children.
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                place = self._known.get(process)
                if place is None:
                    environment = process.environ()
                    if environment.get(local.MARK) == self.head.cluster_id:
                        place = environment.get(NODE, "")
                    else:
                        place = self._by_id.get(process.ppid())
            except (psutil.Error, OSError):
                continue
            if place is not None:
                found[process] = self._known[process] = place
        self._by_id = {process.pid: place for process, place in found.items()}
        return found

    def _kill(self, node: str | None) -> dict["psutil.Process", str]:
        """Kill a node's processes, or all, until none is left; return them with their titles."""
        import psutil

        gone: dict[psutil.Process, str] = {}
        while processes := self.processes(node):
            gone |= processes
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        return gone

    def _start_redis(self, password: str) -> None:
        text = (
            f"port {self.redis_port}\nbind 127.0.0.1\nrequirepass {password}\n"
            f'save ""\ndir {self.folder}\nlogfile {self.folder / "redis.log"}\n'
        )
        # The configuration through stdin, so that no process list shows the password.
        self._redis = subprocess.Popen(
            ["redis-server", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._redis.stdin is not None
        self._redis.stdin.write(text.encode())
        self._redis.stdin.close()
        wait_for(lambda: not _is_free(self.redis_port), 10, "redis-server does not answer")


_COMMON = (
    f"--dashboard-agent-listen-port=0 --object-store-memory={OBJECT_STORE_BYTES} "
    "--disable-usage-stats"
)


@contextmanager
def drill_cluster(
    network: Network | None, *, redis: bool, nodes: tuple[str, ...]
) -> Iterator[DrillCluster]:
    """Give a running cluster of these nodes that is gone afterwards, whatever happened to it."""
    cluster = DrillCluster(network, redis=redis)
    try:
        cluster.start(nodes)
        yield cluster
    finally:
        cluster.stop()


def free_ports(count: int) -> list[int]:
    """Return ports above those of Ray's workers and below those the kernel hands out."""
    start = 20000 + secrets.randbelow(8000)
    found = [port for port in range(start, start + 100) if _is_free(port)]
    return found[:count]


def is_work(title: str) -> bool:
    """Say whether a process's title is that of a Ray task or actor, or of an engine."""
    idle = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", f"ray::{RAYS_OWN}")
    return ENGINE in title or (title.startswith("ray::") and not title.startswith(idle))


def wait_for(ready: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    """Wait until something is so.

    Raises ResourceError with `otherwise` when it is not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise ResourceError(f"{otherwise} after {timeout_s:.0f} s")
        time.sleep(0.1)


def _environment(node: str) -> str:
    settings = " ".join(f"RAY_{name}={value}" for name, value in SETTINGS.items())
    return f"{NODE}={node} PYTHONPATH={REPOSITORY} {settings}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
