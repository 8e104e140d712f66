"""Find what would go wrong with a cluster YAML and a job on it, without starting anything."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pathspec import GitIgnoreSpec

from llava_ray import __version__
from llava_ray.cluster.groups import Cluster, node_types, read_groups, strings_of
from llava_ray.cluster.local import SERVE_PORTS, WORKER_PORTS
from llava_ray.config.run import RunConfig, changed
from llava_ray.errors import ConfigError
from llava_ray.inference.llama_cpp.trial import features
from llava_ray.resources.capacity import find_fleet
from llava_ray.settle import shortages

WORKING_DIR_LIMIT_BYTES = 100 * 2**20
"""Ray uploads larger folders too, but each node downloads them before a job starts."""

_PLACEHOLDER = re.compile(
    r"\b(PROJECT|BUCKET|REGISTRY|VARIANT)\b|OWNER/NAME|203\.0\.113\.\d+", re.ASCII
)
_SECRET = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD)(_|$)", re.IGNORECASE)
_OPEN = ("0.0.0.0/0", "::/0")
_IGNORE_FILES = (".gitignore", ".rayignore")
_NEVER_TRAVEL = (".git", ".venv", "venv", "__pycache__")
"""What Ray leaves out of a working_dir by default."""


@dataclass(frozen=True)
class Finding:
    """One check; `problems` is empty where all is well."""

    check: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def examine(path: Path, config: RunConfig, working_dir: Path, runtime_env: Path) -> list[Finding]:
    """Run all checks.

    Raises ConfigError for a YAML that Ray's own schema refuses.
    """
    cluster = read_groups(path)
    checks = {
        "authentication": _authentication(cluster),
        "open ports": _open_ports(cluster),
        "versions": _versions(cluster),
        "driver": _driver(cluster),
        "spot fallback": _spot_fallback(cluster),
        "capacity": _capacity(cluster, config),
        "storage": _storage(cluster, config),
        "working_dir": _working_dir(working_dir, runtime_env),
        # What Ray's dashboard and job API show in clear.
        "secrets": (
            *_shown(str(runtime_env), _read_runtime_env(runtime_env)),
            *_shown("this YAML", cluster.tree),
        ),
        "placeholders": _placeholders(cluster, config),
    }
    found = [Finding(name, tuple(problems)) for name, problems in checks.items()]
    llama_cpp = "not installed: gguf variants need 'pip install llava_ray[gguf]'"
    if importlib.util.find_spec("llama_cpp"):
        # Tried in a child process where it never was.
        llama_cpp = features()
    notes = {
        "how secrets reach nodes": _secret_means(cluster, config),
        "serving": _serving(config),
        "llama.cpp on this machine": (llama_cpp,),
    }
    return [*found, *(Finding(name, (), tuple(said)) for name, said in notes.items())]


def _serving(config: RunConfig) -> Iterator[str]:
    if config.serve.proxy == "haproxy":
        first, last = SERVE_PORTS[0], SERVE_PORTS[-1]
        yield (
            "HAProxy binds two pages about itself to all interfaces, on ports that the deploy job "
            f"names, of {first} to {last}: let no others in there, such as with: iptables -A INPUT "
            f"-p tcp --dport {first}:{last} ! -s CLUSTER_SUBNET -j DROP"
        )


def _authentication(cluster: Cluster) -> Iterator[str]:
    if cluster.spec is not None:
        mode = (cluster.spec.get("authOptions") or {}).get("mode")
        if mode != "token":
            yield f"authOptions.mode is {mode!r}: set it to token"
        return
    for command in _start_commands(cluster.tree):
        if "RAY_AUTH_MODE=token" not in command:
            shown = command if len(command) <= 60 else f"{command[:57]}..."
            yield f"{shown!r}: put RAY_AUTH_MODE=token before 'ray start'"
    mounts = cluster.tree.get("file_mounts") or {}
    if cluster.workers and not any(path.endswith(".ray/auth_token") for path in mounts):
        yield "file_mounts has no .ray/auth_token: nodes would not know the token"


def _open_ports(cluster: Cluster) -> Iterator[str]:
    if cluster.spec is not None:
        head = cluster.spec["headGroupSpec"]
        kind = head.get("serviceType", "ClusterIP")
        if kind != "ClusterIP":
            yield f"headGroupSpec.serviceType {kind} opens the job API: use ClusterIP"
        if head.get("enableIngress"):
            yield "headGroupSpec.enableIngress opens the job API: leave it out"
        return
    for command in _start_commands(cluster.tree):
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if host and host[1] not in ("127.0.0.1", "localhost", "::1"):
            yield f"--dashboard-host={host[1]}: use 127.0.0.1 and 'ray dashboard' (ssh)"
        for port in re.findall(r"--(?:dashboard-)?port[= ](\d+)", command):
            if int(port) in WORKER_PORTS:
                yield f"port {port}: Ray's workers use 10002-19999"
    provider = cluster.tree["provider"]
    if provider["type"] != "aws":
        return
    rules = (provider.get("security_group") or {}).get("IpPermissions")
    if rules is None:
        yield "provider.security_group is missing: Ray would open port 22 to all addresses"
    for rule in rules or []:
        ranges = [r.get("CidrIp") for r in rule.get("IpRanges", [])]
        ranges += [r.get("CidrIpv6") for r in rule.get("Ipv6Ranges", [])]
        for cidr in ranges:
            if cidr in _OPEN:
                yield f"security_group: port {rule.get('FromPort', 'any')} is open to {cidr}"


def _versions(cluster: Cluster) -> Iterator[str]:
    import ray

    for text in strings_of(cluster.tree):
        for name, wanted in (("rayproject/ray", ray.__version__), ("llava-ray", __version__)):
            image = re.fullmatch(rf"(?:\S+/)?{re.escape(name)}:(\S+)", text)
            if image and image[1].partition("-")[0] != wanted:
                yield f"image {text}: this environment has {name.rpartition('/')[2]} {wanted}"
    if cluster.spec is not None and (named := cluster.spec.get("rayVersion")) != ray.__version__:
        yield f"rayVersion {named!r}: this environment has {ray.__version__}"


def _driver(cluster: Cluster) -> Iterator[str]:
    if cluster.head is not None and cluster.head.spot:
        yield "the head is on spot: the job's driver would vanish with it"
    offered = cluster.head.type.each.num_cpus if cluster.head is not None else 0
    if cluster.workers and offered:
        yield f"the head offers {offered:g} CPUs: tasks would crowd the driver, offer 0"


def _spot_fallback(cluster: Cluster) -> Iterator[str]:
    on_demand = [other for other in cluster.workers if not other.spot and other.type.max_count > 0]
    for spot in (group for group in cluster.workers if group.spot):
        lower = (other.type for other in on_demand if other.priority < spot.priority)
        if not any(other.room_for(spot.type.each) for other in lower):
            name = spot.type.name
            yield f"{name}: no group on demand with the same resources and a lower priority"


def _capacity(cluster: Cluster, config: RunConfig) -> Iterator[str]:
    if cluster.head is None:
        return  # Known only once Ray runs there.
    types = node_types(cluster)
    yield from shortages(config, find_fleet(changed(config, resources={"node_types": types})))


def _storage(cluster: Cluster, config: RunConfig) -> Iterator[str]:
    uri = config.storage.uri
    if cluster.workers and "://" not in uri:
        yield f"storage.uri {uri!r} is a path that nodes do not share: use s3:// or gs://"


def _shown(where: str, tree: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys(_env_vars(tree)):
        if _SECRET.search(name):
            yield (
                f"{where}: a runtime_env holds {name}, which Ray shows in clear: give it to nodes "
                "by a Secret (KubeRay) or a mounted file (file_mounts)"
            )


def _env_vars(tree: Any) -> Iterator[str]:
    """Yield the names of all env_vars in a tree, and in the YAML texts inside it."""
    if isinstance(tree, dict):
        yield from tree["env_vars"] if isinstance(tree.get("env_vars"), dict) else ()
    for text in strings_of(tree):
        if re.search(r"^\s*env_vars:", text, re.MULTILINE):
            yield from _env_vars(yaml.safe_load(text))
    for node in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if not isinstance(node, str):
            yield from _env_vars(node)


def _secret_means(cluster: Cluster, config: RunConfig) -> Iterator[str]:
    key = config.serve.api_key_env
    if cluster.spec is not None:
        yield (
            f"{key} and HF_TOKEN reach pods from the Secret llava-ray-env: kubectl create secret "
            f"generic llava-ray-env --from-literal={key}=... --from-literal=HF_TOKEN=..."
        )
    elif cluster.workers:
        yield (
            f"{key} and HF_TOKEN reach nodes from lines such as HF_TOKEN=... in ~/.llava_ray.env, "
            "mounted by file_mounts, which the start commands read"
        )
    else:
        yield f"{key} and HF_TOKEN reach jobs from the environment of 'llava-ray up'"


def check_job(working_dir: Path, runtime_env: Path) -> None:
    """Raise ConfigError for a job that is too large to travel, or that carries secrets."""
    tree = _read_runtime_env(runtime_env)
    problems = [*_working_dir(working_dir, runtime_env), *_shown(str(runtime_env), tree)]
    if problems:
        raise ConfigError("; ".join(problems))


def _working_dir(folder: Path, runtime_env: Path) -> Iterator[str]:
    size, largest = working_dir_size(folder, runtime_env)
    if size > WORKING_DIR_LIMIT_BYTES:
        named = ", ".join(f"{path} {bytes_ / 2**20:.0f} MiB" for bytes_, path in largest)
        yield (
            f"{folder} is {size / 2**20:.0f} MiB, above {WORKING_DIR_LIMIT_BYTES / 2**20:.0f}: "
            f"add to excludes in {runtime_env} ({named})"
        )


def working_dir_size(folder: Path, runtime_env: Path) -> tuple[int, list[tuple[int, str]]]:
    """Return the bytes that would travel with a job, and the largest entries.

    Raises ConfigError when the runtime_env cannot be read.
    """
    excludes = _read_runtime_env(runtime_env).get("excludes", [])
    sizes: dict[str, int] = {}
    always = GitIgnoreSpec.from_lines([*_NEVER_TRAVEL, *excludes])
    for path in _travelling(folder, [(folder, always)]):
        top = path.relative_to(folder).parts[0]
        sizes[top] = sizes.get(top, 0) + path.stat().st_size
    largest = sorted(((size, name) for name, size in sizes.items()), reverse=True)[:3]
    return sum(sizes.values()), largest


def _read_runtime_env(path: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(path.read_text("utf-8")) or {})
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: no runtime_env YAML ({error})") from error


def _travelling(folder: Path, rules: Sequence[tuple[Path, GitIgnoreSpec]]) -> Iterator[Path]:
    """Yield the files below a folder that no rule leaves out, each relative to its own folder."""
    rules = list(rules)
    for name in _IGNORE_FILES:
        if (path := folder / name).is_file():
            rules.append((folder, GitIgnoreSpec.from_lines(path.read_text("utf-8").splitlines())))
    for path in folder.iterdir():
        slash = "/" if path.is_dir() else ""
        if any(rule.match_file(f"{path.relative_to(at).as_posix()}{slash}") for at, rule in rules):
            continue
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from _travelling(path, rules)


def _placeholders(cluster: Cluster, config: RunConfig) -> Iterator[str]:
    texts = [*strings_of(cluster.tree), config.storage.uri, config.data.source]
    found = dict.fromkeys(match[0] for text in texts for match in _PLACEHOLDER.finditer(text))
    if found:
        yield f"replace {', '.join(found)}"


def _start_commands(tree: dict[str, Any]) -> list[str]:
    keys = ("head_start_ray_commands", "worker_start_ray_commands")
    return [c for key in keys for c in tree.get(key) or [] if "ray start" in c]
