import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray.config.run import load_config
from llava_ray.doctor import Finding, examine, working_dir_size
from llava_ray.errors import ConfigError

REPO = Path(__file__).parents[2]
RUNTIME_ENV = REPO / "jobs" / "runtime_env.yaml"
OVERRIDES = ["model.path=llava-hf/llava-1.5-7b-hf", "storage.uri=s3://mine/runs"]
FILLED = {
    "203.0.113.7": "198.51.100.4",
    "PROJECT": "mine",
    "BUCKET": "mine",
    "REGISTRY": "example.com/mine",
    "VARIANT": "variant-0123456789ab",
    "OWNER/NAME": "mine/captions",
}


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "job.py").write_text("pass")
    return folder


def problems(
    tmp_path: Path,
    working_dir: Path,
    name: str,
    *changes: tuple[str, str],
    extra: tuple[str, ...] = (),
) -> dict[str, tuple[str, ...]]:
    text = (REPO / "cluster" / name).read_text()
    for old, new in (*FILLED.items(), *changes):
        assert old in text or (old, new) not in changes
        text = text.replace(old, new)
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    config = load_config(None, [*OVERRIDES, *extra])
    findings: list[Finding] = examine(path, config, working_dir, RUNTIME_ENV)
    assert len(findings) == 13
    assert "extra buffer types o" in findings[-1].notes[0]
    return {finding.check: finding.problems for finding in findings if finding.problems}


NAMES = [
    "aws.yaml",
    "gcp.yaml",
    *(f"kuberay/{n}.yaml" for n in ("raycluster", "rayjob", "rayservice")),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_clusters_are_well_once_filled_in(
    tmp_path: Path, working_dir: Path, name: str
) -> None:
    assert problems(tmp_path, working_dir, name) == {}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_to_fill_in_is_named(working_dir: Path, name: str) -> None:
    config = load_config(None, OVERRIDES)
    findings = examine(REPO / "cluster" / name, config, working_dir, RUNTIME_ENV)
    assert [finding.check for finding in findings if finding.problems] == ["placeholders"]


@pytest.mark.parametrize(
    ("name", "old", "new", "check", "message"),
    [
        ("aws.yaml", "RAY_AUTH_MODE=token\n    LLAVA_RAY_NODE_TYPES", "LLAVA_RAY_NODE_TYPES",
         "authentication", "put RAY_AUTH_MODE=token before"),
        ("aws.yaml", "  /home/ray/.ray/auth_token: ~/.ray/auth_token\n", "",
         "authentication", "would not know the token"),
        ("kuberay/rayjob.yaml", "mode: token", "mode: disabled", "authentication", "'disabled'"),
        ("aws.yaml", "198.51.100.4/32", "0.0.0.0/0", "open ports", "port 22 is open to 0.0.0.0/0"),
        ("aws.yaml", "security_group:", "cloudwatch:", "open ports", "security_group is missing"),
        ("gcp.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0",
         "open ports", "use 127.0.0.1"),
        ("gcp.yaml", "--port=6379", "--port=10500", "open ports", "workers use 10002-19999"),
        ("kuberay/raycluster.yaml", "headGroupSpec:\n",
         "headGroupSpec:\n    serviceType: NodePort\n", "open ports", "NodePort opens the job API"),
        ("aws.yaml", "ray:2.60.0", "ray:2.59.0", "versions", "this environment has ray 2.60.0"),
        ("kuberay/rayjob.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.9.3"',
         "versions", "rayVersion '2.9.3'"),
        ("kuberay/rayjob.yaml", "llava-ray:0.1.0", "llava-ray:0.0.9",
         "versions", "llava-ray 0.1.0"),
        ("aws.yaml", "      InstanceType: m7i.2xlarge\n",
         "      InstanceType: m7i.2xlarge\n      InstanceMarketOptions: {MarketType: spot}\n",
         "driver", "the head is on spot"),
        ("gcp.yaml", '{"CPU": 0}', '{"CPU": 8}', "driver", "tasks would crowd the driver"),
        ("aws.yaml", "priority: 1\n", "priority: 20\n", "spot fallback", "gpu_spot: no group"),
        ("gcp.yaml", '"GPU": 1', '"GPU": 0', "capacity", "nothing can train here: resources."),
    ],
)  # fmt: skip
def test_each_mistake_is_found(
    tmp_path: Path, working_dir: Path, name: str, old: str, new: str, check: str, message: str
) -> None:
    found = problems(tmp_path, working_dir, name, (old, new))
    assert list(found) == [check]
    assert message in found[check][0]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kuberay/rayservice.yaml", "PYTHONPATH: /home/ray/llava_ray", "HF_TOKEN: hf_1"),
        ("kuberay/rayjob.yaml", "  backoffLimit: 2\n",
         "  backoffLimit: 2\n  runtimeEnvYAML: |\n    env_vars: {HF_TOKEN: hf_1}\n"),
    ],
)  # fmt: skip
def test_a_secret_in_a_runtime_env_is_found(
    tmp_path: Path, working_dir: Path, name: str, old: str, new: str
) -> None:
    """B6"""
    found = problems(tmp_path, working_dir, name, (old, new))
    assert list(found) == ["secrets"]
    assert found["secrets"][0].startswith("this YAML: a runtime_env holds HF_TOKEN, which Ray")


@pytest.mark.parametrize("name", NAMES)
def test_how_secrets_reach_nodes_is_said(working_dir: Path, name: str) -> None:
    """B6"""
    config = load_config(None, OVERRIDES)
    findings = examine(REPO / "cluster" / name, config, working_dir, RUNTIME_ENV)
    (said,) = (f.notes[0] for f in findings if f.check == "how secrets reach nodes")
    assert ("Secret llava-ray-env" if "kuberay" in name else "~/.llava_ray.env") in said
    assert "llava-ray-env" in (text := (REPO / "cluster" / name).read_text()) or (
        ".llava_ray.env" in text or "llava-ray-api" in text
    )


def submit(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from llava_ray.cli import main; main()", "submit", *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_job_too_large_to_travel_is_one_line_before_it_is_sent(working_dir: Path) -> None:
    """B7"""
    (working_dir / "video").mkdir()
    with (working_dir / "video" / "long.mp4").open("wb") as stream:
        stream.truncate(1300 * 2**20)
    done = submit("--working-dir", str(working_dir), "--", "python", "job.py")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is 1300 MiB, above 100: add to excludes" in done.stderr
    assert "(video 1300 MiB, job.py 0 MiB)" in done.stderr


def test_a_job_with_a_secret_is_not_sent(tmp_path: Path, working_dir: Path) -> None:
    """B6"""
    runtime_env = tmp_path / "runtime_env.yaml"
    runtime_env.write_text("env_vars: {WANDB_API_KEY: x, TOKENIZERS_PARALLELISM: 'false'}\n")
    done = submit(
        "--working-dir", str(working_dir), "--runtime-env", str(runtime_env), "--", "true"
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "holds WANDB_API_KEY, which" in done.stderr and "TOKENIZERS" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.cpus_per_worker=64", r"nothing can train here: train.num_workers=8 .* no node"),
        ("train.num_workers=9", r"nothing can train here: train.num_workers=9 .* has room for 8"),
        ("serve.max_replicas=20", r"serve asks for 20 times 1 CPUs, 1 GPUs: .* has room for 8"),
        ("serve.gpus_per_replica=2", r"serve asks for 1 CPUs, 2 GPUs: the cluster has no node"),
        ("resources.accelerator=cpu", None),
    ],
)
def test_work_that_never_fits_is_found(
    tmp_path: Path, working_dir: Path, override: str, message: str | None
) -> None:
    found = problems(tmp_path, working_dir, "aws.yaml", extra=(override,))
    if message is None:
        assert found == {}
        return
    assert list(found) == ["capacity"]
    assert re.match(message, found["capacity"][0])


def test_a_path_is_no_storage_for_several_nodes(tmp_path: Path, working_dir: Path) -> None:
    found = problems(tmp_path, working_dir, "aws.yaml", extra=("storage.uri=/data/runs",))
    assert list(found) == ["storage"]


def test_the_working_dir_is_weighed_as_ray_would_pack_it(tmp_path: Path, working_dir: Path) -> None:
    runtime_env = tmp_path / "runtime_env.yaml"
    runtime_env.write_text("excludes: [.git]\n")
    for name in (".git/pack", "ignored/x", "data/images/a"):
        (working_dir / name).parent.mkdir(parents=True)
        (working_dir / name).write_bytes(b"1" * 1000)
    (working_dir / ".gitignore").write_text("ignored/\n")
    size, largest = working_dir_size(working_dir, runtime_env)
    assert size == 1000 + len("ignored/\n") + len("pass")
    assert [name for _, name in largest] == ["data", ".gitignore", "job.py"]

    with (working_dir / "weights.bin").open("wb") as stream:
        stream.truncate(101 * 2**20)
    found = problems(tmp_path, working_dir, "aws.yaml")
    assert "above 100: add to excludes" in found["working_dir"][0]
    assert "weights.bin 101 MiB" in found["working_dir"][0]
    with pytest.raises(ConfigError, match="no runtime_env YAML"):
        working_dir_size(working_dir, tmp_path / "gone.yaml")


def test_this_repository_is_light_enough_to_travel() -> None:
    size, largest = working_dir_size(REPO, RUNTIME_ENV)
    assert 100_000 < size < 100 * 2**20, largest


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["cluster/local.yaml"], 0, "ok  authentication"),
        (["cluster/aws.yaml", "storage.uri=/tmp/x"], 2, "BAD storage"),
        (["cluster/aws.yaml", "train.lerning_rate=1"], 2, "did you mean 'train.learning_rate'"),
        (["jobs/runtime_env.yaml"], 2, "'cluster_name' is a required property"),
    ],
)
def test_the_job_script_says_what_is_wrong(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/doctor.py", *arguments], cwd=REPO, capture_output=True, text=True,
        env={"PYTHONPATH": str(REPO), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_haproxys_open_pages_are_named_with_a_rule_for_the_firewall(
    tmp_path: Path, working_dir: Path
) -> None:
    def notes(*overrides: str) -> str:
        config = load_config(None, [*OVERRIDES, *overrides])
        found = examine(REPO / "cluster" / "aws.yaml", config, working_dir, RUNTIME_ENV)
        return "".join(
            note for finding in found if finding.check == "serving" for note in finding.notes
        )

    assert "20000:31999 ! -s CLUSTER_SUBNET -j DROP" in notes("serve.proxy=haproxy")
    assert notes() == ""
