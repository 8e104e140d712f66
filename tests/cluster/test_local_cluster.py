import os
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llava_ray.cluster.commands import main
from llava_ray.cluster.local import MARK, Head, down, processes_of, running, up
from llava_ray.errors import ConfigError, ResourceError

LOCAL = Path(__file__).parents[2] / "cluster" / "local.yaml"
PORT_VARIABLES = ("LLAVA_RAY_PORT", "LLAVA_RAY_DASHBOARD_PORT", "LLAVA_RAY_CLIENT_PORT")


def free_ports(count: int) -> list[int]:
    """Return ports above those of Ray's workers and below those the kernel hands out."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and len(found) < count:
                found.append(port)
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, port in zip(PORT_VARIABLES, free_ports(3), strict=True):
            patch.setenv(name, str(port))
        try:
            yield up(LOCAL)
        finally:
            down(LOCAL)


def status_of(head: Head, method: str = "GET", **headers: str) -> int:
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/", method=method, headers=headers,
        data=b'{"entrypoint": "touch /tmp/owned"}' if method == "POST" else None,
    )  # fmt: skip
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_token_is_its_owners_alone(head: Head) -> None:
    path = Path(head.token_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64


def test_up_finds_the_running_head(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    assert up(LOCAL) == head
    main(["status", str(LOCAL)])
    assert f"running at {head.address}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_job_api_refuses_strangers(head: Head, method: str) -> None:
    assert status_of(head, method) == 401
    assert status_of(head, method, Authorization=f"Bearer {'0' * 64}") == 403
    browser = {
        "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/140.0",
        "Origin": "http://example.com",
        "Sec-Fetch-Site": "cross-site",
        "Content-Type": "text/plain",
    }
    assert status_of(head, method, **browser) in (401, 403, 405)
    token = Path(head.token_path).read_text()
    assert status_of(head, Authorization=f"Bearer {token}") == 200
    if method == "POST":
        # A page in a browser that knows the token must still not post from elsewhere.
        assert status_of(head, method, Authorization=f"Bearer {token}", **browser) >= 400
    assert not Path("/tmp/owned").exists()


def test_a_job_runs_and_its_exit_code_is_kept(
    head: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["env", str(LOCAL)])
    exports = capsys.readouterr().out
    (tmp_path / "job.py").write_text(
        "import sys, ray\nray.init()\nprint('CPUs', ray.cluster_resources()['CPU'])\nsys.exit(2)\n"
    )
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    submit = f"{ray} job submit --submission-id j1 --working-dir . -- {sys.executable} job.py"
    done = subprocess.run(
        ["bash", "-c", f"{exports}\n{submit}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=90,
        env={**os.environ, "RAY_AUTH_TOKEN": "a wrong one that must not win"},
    )  # fmt: skip
    assert "CPUs" in done.stdout, done.stderr
    assert done.returncode == 1
    for name, value in head.environment().items():
        monkeypatch.setenv(name, value)
    ask = (
        "from ray.job_submission import JobSubmissionClient as Client\n"
        "from llava_ray.quickstart import exit_code_of\n"
        "print(exit_code_of(Client(), 'j1'))"
    )
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    assert asked.stdout == "2\n", asked.stderr


def test_a_port_in_use_is_one_line_and_exit_code_2(
    head: Head,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as raised:
        main(["up", str(LOCAL)])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    port = head.address.partition(":")[2]
    assert said.startswith(f"error: port {port} is in use")
    assert "set LLAVA_RAY_PORT to" in said
    assert said.count("\n") == 1


def test_down_stops_that_head_and_nothing_else(head: Head) -> None:
    environment = {**os.environ, MARK: "another head's"}
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, env=environment)
    try:
        assert len(processes_of(head.cluster_id)) >= 5
        assert down(LOCAL) >= 5
        assert processes_of(head.cluster_id) == []
        assert running(LOCAL) is None
        assert psutil.pid_exists(bystander.pid) and bystander.poll() is None
        assert down(LOCAL) == 0
    finally:
        bystander.kill()
        bystander.communicate()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LLAVA_RAY_PORT", "10500", "workers use 10002-19999; set LLAVA_RAY_PORT"),
        ("LLAVA_RAY_DASHBOARD_PORT", "http", "LLAVA_RAY_DASHBOARD_PORT='http': not a port"),
        ("LLAVA_RAY_CLIENT_PORT", "80", "LLAVA_RAY_CLIENT_PORT='80': not a port"),
    ],
)
def test_a_bad_port_names_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path))
    for name, port in zip(PORT_VARIABLES, free_ports(3), strict=True):
        monkeypatch.setenv(name, str(port))
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        up(LOCAL)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type: local", "type: aws", "use 'ray up'"),
        ("head_ip: 127.0.0.1", "head_ip: 10.0.0.1", "on 127.0.0.1 only"),
        ("RAY_AUTH_MODE=token ray start", "ray stop; ray start", "every Ray of this user"),
        ("max_workers: 0", "max_workers: -1", "max_workers: -1 is less than the minimum"),
        ("max_workers: 0", "min_wrkers: 0", "'min_wrkers' was unexpected"),
        ("max_workers: 0", "max_workers: [", "not YAML"),
        ("ray start", "echo", "has no 'ray start'"),
    ],
)
def test_a_yaml_for_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path))
    text = LOCAL.read_text()
    assert old in text
    path = tmp_path / "cluster.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        up(path)
    with pytest.raises(ConfigError, match="no cluster YAML"):
        up(tmp_path / "gone.yaml")


def test_a_head_that_fails_to_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path))
    for name, port in zip(PORT_VARIABLES, free_ports(3), strict=True):
        monkeypatch.setenv(name, str(port))
    path = tmp_path / "cluster.yaml"
    path.write_text(LOCAL.read_text().replace("--head", "--head --no-such-option"))
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"did not start \(exit code 2\): .*no-such-option"):
        up(path)
    assert time.monotonic() - start < 60
    assert running(path) is None
