import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from llava_ray import __version__
from llava_ray.cluster.groups import Cluster, quantity, ray_cluster_spec, read_groups, strings_of
from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError
from llava_ray.server.settings import AppArgs

REPO = Path(__file__).parents[2]
CLUSTER = REPO / "cluster"
LAUNCHER = [CLUSTER / name for name in ("local.yaml", "aws.yaml", "gcp.yaml")]
KUBERAY = [CLUSTER / "kuberay" / f"{name}.yaml" for name in ("raycluster", "rayjob", "rayservice")]
CLOUD = [*LAUNCHER[1:], *KUBERAY]


def named(paths: list[Path]) -> dict[str, Any]:
    return {"argvalues": paths, "ids": [path.stem for path in paths]}


def pinned(package: str) -> str:
    locked = (REPO / "jobs" / "requirements" / "linux-x86_64.txt").read_text()
    return re.findall(rf"^{package}==(\S+)", locked, re.MULTILINE)[0]


def test_every_yaml_is_known_to_these_tests() -> None:
    others = {CLUSTER / "kuberay" / "redis.yaml"}
    assert set(CLUSTER.rglob("*.yaml")) == {*LAUNCHER, *KUBERAY, *others}


@pytest.mark.parametrize("path", **named([*LAUNCHER, *KUBERAY]))
def test_every_yaml_opens_with_what_it_needs_and_how_to_run_it(path: Path) -> None:
    header = path.read_text().partition("\ncluster_name:")[0].partition("\napiVersion:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for part in ("# What: ", "# Needs: ", "# Run: ", "# Override: "):
        assert part in header
    assert [line for line in header.splitlines() if len(line) > 100] == []
    assert f"cluster/{path.relative_to(CLUSTER)}" in header


@pytest.mark.parametrize("path", **named(LAUNCHER))
def test_rays_launcher_accepts_it(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    read_groups(path)
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", **named(CLOUD))
def test_it_scales_gpus_from_zero_or_one_with_spot_first(path: Path) -> None:
    cluster = read_groups(path)
    gpu = {
        group.type.name.replace("-", "_"): group
        for group in cluster.workers
        if group.type.each.num_gpus
    }
    assert set(gpu) == {"gpu_spot", "gpu_on_demand"}
    spot, demand = gpu["gpu_spot"], gpu["gpu_on_demand"]
    assert (spot.spot, demand.spot) == (True, False)
    assert spot.priority > demand.priority
    assert spot.type.each == demand.type.each
    # An endpoint keeps one replica on a node that is not taken away.
    assert (spot.min_count, demand.min_count) == (0, int(path.stem == "rayservice"))
    assert spot.type.max_count >= 8
    assert any(
        group.type.each.num_cpus and not group.type.each.num_gpus for group in cluster.workers
    )
    assert (
        cluster.head is not None and not cluster.head.spot and cluster.head.type.each.num_cpus == 0
    )


@pytest.mark.parametrize("path", **named(CLOUD))
def test_images_and_versions_are_those_of_pyproject(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    ray = pinned("ray")
    if "provider" in tree:
        assert tree["docker"]["image"] == f"rayproject/ray:{ray}-py311-gpu"
        return
    assert ray_cluster_spec(tree)["rayVersion"] == ray
    images = {text for text in strings_of(tree) if "llava-ray:" in text}
    assert images == {f"REGISTRY/llava-ray:{__version__}"}


def test_the_image_is_built_on_the_pinned_ray() -> None:
    text = (CLUSTER / "kuberay" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)$", text, re.MULTILINE) == [
        f"rayproject/ray:{pinned('ray')}-py311-gpu"
    ]
    assert f"llava-ray:{__version__}" in text
    assert version("ray") == pinned("ray")
    for copied in re.findall(r"^COPY --chown=ray:users (.+) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (REPO / name).exists() or name == "README.md"


@pytest.mark.parametrize("path", **named(LAUNCHER[1:]))
def test_nodes_get_the_token_and_the_package(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    mounts = tree["file_mounts"]
    assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    extras = re.search(r"\[(.*)\]", "".join(tree["setup_commands"]))
    assert extras is not None
    known = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(known)


def test_the_service_runs_the_application_of_this_repository() -> None:
    tree = yaml.safe_load((CLUSTER / "kuberay" / "rayservice.yaml").read_text())
    serve = yaml.safe_load(tree["spec"]["serveConfigV2"])
    own = yaml.safe_load((REPO / "serve" / "config.yaml").read_text())
    app = serve["applications"][0]
    assert app["import_path"] == own["applications"][0]["import_path"]
    args = AppArgs.model_validate(app["args"])
    assert args.gpus_per_replica == 1
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(serve)
    # Off loopback the endpoint wants a key, on every node that may run a replica.
    spec = ray_cluster_spec(tree)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        names = [e["name"] for e in group["template"]["spec"]["containers"][0]["env"]]
        assert names == [args.api_key_env]


def test_the_job_runs_a_job_script_with_a_valid_config() -> None:
    tree = yaml.safe_load((CLUSTER / "kuberay" / "rayjob.yaml").read_text())
    _, script, *overrides = tree["spec"]["entrypoint"].split()
    assert (REPO / "jobs" / Path(script).name).is_file()
    assert load_config(None, overrides).storage.uri == "gs://BUCKET/llava_ray"


@pytest.mark.parametrize("path", **named(KUBERAY))
def test_kuberays_head_survives_on_redis(path: Path) -> None:
    spec = ray_cluster_spec(yaml.safe_load(path.read_text()))
    redis = list(yaml.safe_load_all((CLUSTER / "kuberay" / "redis.yaml").read_text()))
    service = next(d for d in redis if d["kind"] == "Service")
    storage = spec["gcsFaultToleranceOptions"]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert storage["redisAddress"] == f"{name}:{port}"
    stateful = next(d for d in redis if d["kind"] == "StatefulSet")
    env = stateful["spec"]["template"]["spec"]["containers"][0]["env"][0]
    assert storage["redisPassword"]["valueFrom"] == env["valueFrom"]


def test_kuberays_three_clusters_are_the_same_but_for_what_the_service_needs() -> None:
    def groups(cluster: Cluster) -> list[tuple[Any, ...]]:
        return [g.type for g in cluster.workers]

    first, *others = [groups(read_groups(path)) for path in KUBERAY]
    assert all(other == first for other in others)


@pytest.mark.skipif(
    "LLAVA_RAY_KUBERAY_CRDS" not in os.environ,
    reason="set LLAVA_RAY_KUBERAY_CRDS to ray-operator/config/crd/bases of KubeRay 1.7.0",
)
@pytest.mark.parametrize("path", **named(KUBERAY))
def test_kuberays_crd_accepts_it(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    folder = Path(os.environ["LLAVA_RAY_KUBERAY_CRDS"])
    crd = yaml.safe_load((folder / f"ray.io_{tree['kind'].lower()}s.yaml").read_text())
    versions = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"]}
    schema = closed(versions[tree["apiVersion"].partition("/")[2]]["properties"]["spec"])
    assert [e.message for e in Draft7Validator(schema).iter_errors(tree["spec"])] == []
    tree["spec"]["noSuchField"] = 1
    assert list(Draft7Validator(schema).iter_errors(tree["spec"]))


def closed(schema: Any) -> Any:
    """Refuse unknown fields, as `kubectl apply` does with strict validation."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


@pytest.mark.parametrize(
    ("text", "value"),
    [("140Gi", 140 * 2**30), ("250m", 0.25), (2, 2.0), ("1.5", 1.5), ("4k", 4000)],
)
def test_quantities_are_read(text: str | float, value: float) -> None:
    assert quantity(text) == value


def test_other_kubernetes_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="none of ray.io"):
        read_groups(CLUSTER / "kuberay" / "redis.yaml")
    with pytest.raises(ConfigError, match="no cluster YAML"):
        read_groups(CLUSTER / "gone.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "apiVersion: ray.io/v1\nkind: RayCluster\n",
        "apiVersion: ray.io/v1\nkind: RayThing\nspec: {}\n",
        "apiVersion: ray.io/v1\nkind: RayCluster\nspec: {workerGroupSpecs: [{groupName: a}]}\n",
        "apiVersion: ray.io/v1\nkind: RayCluster\nspec: {headGroupSpec: {template: {spec: "
        "{containers: [{resources: {limits: {memory: 56Zz}}}]}}}}\n",
        "cluster_name: a\nmax_workers: -8\nprovider: {type: aws, region: b}\nhead_node_type: h\n"
        "available_node_types: {h: {node_config: {}, resources: {}}}\n",
    ],
)
def test_what_is_no_cluster_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_groups(tmp_path / "cluster.yaml")
    assert "\n" not in str(caught.value)


def test_all_units_of_memory_are_read() -> None:
    assert [quantity(text) for text in ("56Pi", "2T", "1Ei", "250m", "3")] == [
        56 * 2**50, 2e12, 2**60, 0.25, 3,
    ]  # fmt: skip
