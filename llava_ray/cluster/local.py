"""Start, find and stop the head of a cluster YAML on this machine, without ssh.

Surprising: `ray stop` ends every Ray of the user. Here each head's processes carry an id in their
environment, and only those are stopped.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from llava_ray.artifacts.faults import disk_errors
from llava_ray.artifacts.storage import cache_folder, check_writable
from llava_ray.cluster.schema import read_cluster
from llava_ray.errors import ConfigError, ResourceError

MARK = "LLAVA_RAY_CLUSTER_ID"
WORKER_PORTS = range(10002, 20000)
SERVE_PORTS = range(20_000, 32_000)
"""Those that HAProxy and what it leads to take a hundred of, below the system's own choice."""
NODE_TYPES = "LLAVA_RAY_NODE_TYPES"
"""Environment variable with the default of resources.node_types."""
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0

_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
_AUTOSCALING = re.compile(r"--autoscaling-config[= ](\S+)")
_PORT_OPTION = re.compile(r"--(port|dashboard-port|ray-client-server-port)[= ](\S+)")


@dataclass(frozen=True)
class Head:
    """A head that was started on this machine."""

    cluster_id: str
    address: str
    """host:port for ray.init."""
    dashboard: str
    """URL for `ray job submit`."""
    token_path: str
    log_path: str
    node_types: str = "up"
    """What resources.node_types is by default: the YAML that its autoscaler has, if it has one."""

    def environment(self) -> dict[str, str]:
        """Return what a client's environment needs."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            # `serve` knows it by another name, and would else ask port 8265, whosever that is.
            "RAY_DASHBOARD_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            NODE_TYPES: self.node_types,
        }


def up(path: Path) -> Head:
    """Run the YAML's head_start_ray_commands, or return the head that already runs.

    Raises ConfigError for a YAML that is not for this machine, ResourceError when a port is in use
    or the head does not start.
    """
    tree = read_cluster(path)
    commands = _commands(path, tree)
    folder = _folder(tree)
    check_writable(folder, "LLAVA_RAY_CACHE")
    found = running(path)
    if found:
        return found
    if re.search(r"\s", sys.executable):
        raise ResourceError(
            f"Ray starts no worker from a path with spaces, {sys.executable}: use an environment "
            "elsewhere"
        )
    ports = _check_ports(commands)
    autoscaling = _AUTOSCALING.search(" ".join(commands))
    with disk_errors(str(folder)):
        head = Head(
            cluster_id=secrets.token_hex(8),
            address=f"{tree['provider']['head_ip']}:{ports['port']}",
            dashboard=f"http://{tree['provider']['head_ip']}:{ports['dashboard-port']}",
            token_path=str(token_file(folder)),
            log_path=str(folder / "head.log"),
            node_types=autoscaling[1] if autoscaling else "up",
        )
        # First, so that `down` knows what to end if this process is killed meanwhile.
        (folder / "head.json").write_text(json.dumps(asdict(head), indent=1), encoding="utf-8")
        try:
            start(head, commands)
        except BaseException:
            down(path)
            raise
    return head


def down(path: Path) -> int:
    """Stop the head of a YAML with all it started; return how many processes that were."""
    tree = read_cluster(path)
    head = _remembered(tree)
    if head is None:
        return 0
    stopped = stop(head)
    (_folder(tree) / "head.json").unlink(missing_ok=True)
    return stopped


def running(path: Path) -> Head | None:
    """Return the head of a YAML if it runs and answers."""
    head = _remembered(read_cluster(path))
    if head is None or not processes_of(head.cluster_id):
        return None
    return head if _answer(head) == 200 else None


def processes_of(cluster_id: str) -> list[psutil.Process]:
    """Return the live processes that a head started, itself included."""
    return [
        process
        for process in psutil.process_iter(["status", "environ"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and (process.info["environ"] or {}).get(MARK) == cluster_id
    ]


def _commands(path: Path, tree: dict[str, Any]) -> list[str]:
    provider = tree["provider"]
    if provider["type"] != "local" or provider.get("head_ip") not in ("127.0.0.1", "localhost"):
        raise ConfigError(
            f"{path}: provider is {provider['type']!r} with head_ip {provider.get('head_ip')!r}; "
            "this starts heads on 127.0.0.1 only, use 'ray up' for others"
        )
    commands = tree.get("head_start_ray_commands") or []
    if not any("ray start" in command for command in commands):
        raise ConfigError(f"{path}: head_start_ray_commands has no 'ray start'")
    if any("ray stop" in command for command in commands):
        raise ConfigError(f"{path}: 'ray stop' would end every Ray of this user; leave it out")
    return list(commands)


def _check_ports(commands: list[str]) -> dict[str, int]:
    """Return the ports by option name, all of them free."""
    ports = {"port": 6379, "dashboard-port": 8265, "ray-client-server-port": 10001}
    variables: dict[str, str] = {}
    for command in commands:
        for option, text in _PORT_OPTION.findall(command):
            variable = _VARIABLE.search(text)
            name = variables[option] = variable[1] if variable else f"--{option}"
            value = _expand(text)
            if not value.isdecimal() or not 1024 <= int(value) <= 65535:
                raise ConfigError(f"{name}={value!r}: not a port between 1024 and 65535")
            ports[option] = int(value)
    for option, port in ports.items():
        cure = f"set {variables.get(option, f'--{option}')} to a free one"
        if port in WORKER_PORTS:
            raise ConfigError(f"port {port}: Ray's workers use 10002-19999; {cure} outside of that")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ResourceError(
                    f"port {port} is in use ({error.strerror}): {cure} outside 10002-19999, "
                    "or stop what listens there"
                ) from error
    return ports


def _expand(command: str) -> str:
    return _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2], command)


def start(head: Head, commands: list[str]) -> None:
    """Run commands in bash with the head's mark and token, until its job API answers.

    Raises ResourceError with the last error of its log.
    """
    environment = {**os.environ, **head.environment(), MARK: head.cluster_id}
    # RAY_AUTH_TOKEN would win over the file; the addresses would make `ray start` join another.
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    # The `ray` beside this Python, whether or not its environment is activated.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    deadline = time.monotonic() + START_TIMEOUT_S
    log = Path(head.log_path)
    with log.open("wb") as stream:
        for command in commands:
            try:
                done = subprocess.run(
                    ["bash", "-c", _expand(command)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    timeout=START_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired as error:
                raise _not_started(log, f"not done after {START_TIMEOUT_S:.0f} s") from error
            if done.returncode:
                raise _not_started(log, f"exit code {done.returncode}")
    while (answer := _answer(head)) != 200:
        if time.monotonic() > deadline:
            raise _not_started(log, f"its job API answers {answer or 'nothing'}")
        time.sleep(0.3)


def _not_started(log: Path, reason: str) -> ResourceError:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if "rror" in line]
    return ResourceError(
        f"the Ray head did not start ({reason}): {said[-1] if said else 'see its log'}; log: {log}"
    )


def _answer(head: Head) -> int | None:
    """Return the HTTP status of the head's job API asked with its token, None for no answer."""
    try:
        token = Path(head.token_path).read_text(encoding="utf-8").strip()
        # Not by urllib: a proxy of the environment does not know this machine's loopback.
        with closing(HTTPConnection(urlsplit(head.dashboard).netloc, timeout=5)) as connection:
            connection.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status
    except (OSError, HTTPException):
        return None


def stop(head: Head) -> int:
    """End all processes that carry the head's mark; return how many that were."""
    stopped: set[int] = set()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    # Again until none is left: a raylet may start a worker while it is being stopped.
    while processes := processes_of(head.cluster_id):
        kill = time.monotonic() > deadline
        for process in processes:
            stopped.add(process.pid)
            try:
                process.kill() if kill else process.terminate()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=3)
    return len(stopped)


def token_file(folder: Path) -> Path:
    """Return the file with the cluster's token, made once and readable by its owner alone."""
    path = folder / "auth_token"
    with suppress(FileExistsError):
        path.touch(0o600, exist_ok=False)
        path.write_text(secrets.token_hex(32), encoding="utf-8")
    path.chmod(0o600)
    return path


def _folder(tree: dict[str, Any]) -> Path:
    return cache_folder() / "cluster" / str(tree["cluster_name"])


def _remembered(tree: dict[str, Any]) -> Head | None:
    path = _folder(tree) / "head.json"
    try:
        return Head(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
