"""Predict time and price of a run on a cluster, for more and more GPUs, from measured rates.

Surprising: nothing is guessed. What was not measured is named and left out of the sums.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_ray.cluster.demand import Demand, demands_of
from llava_ray.cluster.groups import Cluster, NodeGroup
from llava_ray.cluster.rates import Rates
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError

GRADIENT_BYTES = 2
"""bf16."""


@dataclass(frozen=True)
class Market:
    """What a node group is in the world outside Ray."""

    group: NodeGroup
    accelerator: str
    network_gbps: float
    usd_per_hour: float | None
    """Of one node."""


@dataclass(frozen=True)
class Interruptions:
    """How often one spot node is taken, and what that costs."""

    per_node_hour: float = 0
    restart_s: float = 0
    checkpoint_every_s: float = 0

    def stretch(self, nodes: int) -> float | None:
        """Return by what factor training takes longer, None where it never ends.

        Each loss of a node costs the restart and, on average, half a checkpoint's interval.
        """
        lost = nodes * self.per_node_hour / 3600 * (self.restart_s + self.checkpoint_every_s / 2)
        return 1 / (1 - lost) if lost < 1 else None


@dataclass(frozen=True)
class Prediction:
    """One row: a run on so many GPUs."""

    gpus: int
    nodes: int
    optimizer_steps: int
    train_s: float | None
    efficiency: float
    """Training's speed over `gpus` times that of one."""
    quantize_s: float
    benchmark_s: float
    merge_s: float
    gpu_hours: float | None
    usd: float | None

    @property
    def total_s(self) -> float | None:
        """All measured stages one after the other."""
        if self.train_s is None:
            return None
        return self.train_s + self.merge_s + self.quantize_s + self.benchmark_s


def markets_of(cluster: Cluster) -> list[Market]:
    """Return the groups with GPUs, as the YAML's metadata describes them.

    Raises ConfigError for a group whose GPU or network is not said.
    """
    told: Mapping[str, Mapping[str, float | str]] = cluster.tree.get("metadata") or {}
    markets = []
    for group in cluster.workers:
        if not group.gpus:
            continue
        missing = [k for k in ("accelerator", "network_gbps") if group.name not in told.get(k, {})]
        if missing:
            raise ConfigError(
                f"{cluster.path}: metadata.{missing[0]} says nothing of {group.name!r}"
            )
        price = (told.get("usd_per_hour") or {}).get(group.name)
        markets.append(
            Market(
                group,
                str(told["accelerator"][group.name]),
                float(told["network_gbps"][group.name]),
                None if price is None else float(price),
            )
        )
    if not markets:
        raise ConfigError(f"{cluster.path}: no node group with GPUs")
    return markets


def predict(
    config: RunConfig,
    market: Market,
    rates: Rates,
    *,
    samples: int,
    gpus: int,
    relative_speed: float = 1,
    interruptions: Interruptions | None = None,
) -> Prediction:
    """Predict a run of `samples` training samples an epoch on `gpus` GPUs of one group.

    `relative_speed` is that of the group's GPU over the measured one. Raises ConfigError where
    the rates are of another GPU and no relative speed is given.
    """
    if relative_speed == 1 and market.accelerator.lower() not in rates.accelerator.lower():
        raise ConfigError(
            f"{market.group.name} has {market.accelerator}, the rates are of {rates.accelerator}: "
            "give rates of that GPU, or --relative-speed"
        )
    nodes = -(-gpus // int(market.group.gpus))
    steps = -(-int(samples * config.train.epochs) // (gpus * rates.train_batch_size))
    compute_s = rates.train_batch_size / rates.train_samples_per_s / relative_speed
    step_s = compute_s + _exchange_s(rates, market, nodes, gpus)
    stretch = (interruptions or Interruptions()).stretch(nodes) if market.group.spot else 1
    train_s = None if stretch is None else steps * step_s * stretch
    quantize_s = _parallel(config, rates.quantize_s, gpus) / relative_speed
    benchmark_s = _parallel(config, rates.benchmark_s, gpus, whole=True) / relative_speed
    merge_s = rates.merge_s or 0
    total_s = None if train_s is None else train_s + quantize_s + benchmark_s + merge_s
    node_hours = None if total_s is None else total_s / 3600 * nodes
    price = market.usd_per_hour
    return Prediction(
        gpus=gpus,
        nodes=nodes,
        optimizer_steps=steps,
        train_s=train_s,
        efficiency=compute_s / step_s,
        quantize_s=quantize_s,
        benchmark_s=benchmark_s,
        merge_s=merge_s,
        gpu_hours=None if node_hours is None else node_hours * market.group.gpus,
        usd=None if node_hours is None or price is None else node_hours * price,
    )


def unmeasured(config: RunConfig, rates: Rates) -> list[str]:
    """Name what a prediction leaves out."""
    left_out = [] if rates.merge_s else ["merge"]
    for stage, known in (("quantize", rates.quantize_s), ("benchmark", rates.benchmark_s)):
        slugs = [slug for slug in config.quantize.variants if slug not in known]
        if slugs:
            left_out.append(f"{stage} of {', '.join(slugs)}")
    return [*left_out, "prepare", "start of nodes", "download of the model"]


def _exchange_s(rates: Rates, market: Market, nodes: int, gpus: int) -> float:
    """Return seconds of a ring all-reduce of the trained weights' gradients between nodes.

    Each node sends and receives 2 (n - 1) / n of them, nothing hidden behind computing: an upper
    bound. Inside a node it is not counted.
    """
    if nodes == 1 or gpus == 1:
        return 0
    sent_bytes = 2 * (nodes - 1) / nodes * rates.trained_parameters * GRADIENT_BYTES
    return sent_bytes / (market.network_gbps * 1e9 / 8)


def _parallel(
    config: RunConfig, seconds: Mapping[str, float], gpus: int, *, whole: bool = False
) -> float:
    """Return how long the measured variants take on `gpus` GPUs, each on its share of one."""
    demands = {d.what.removeprefix("quantize "): d for d in demands_of(config, gpu=True)}
    jobs = [
        (seconds[slug], 1.0 if whole else _share(demands[slug]))
        for slug in config.quantize.variants
        if slug in seconds
    ]
    return makespan(jobs, gpus)


def _share(demand: Demand) -> float:
    return demand.gpus


def makespan(jobs: Sequence[tuple[float, float]], gpus: int) -> float:
    """Schedule (seconds, share of a GPU) longest first and return when the last one ends.

    Jobs without a GPU run beside the others.
    """
    on_cpu = max((seconds for seconds, share in jobs if not share), default=0.0)
    now, free = 0.0, [1.0] * gpus
    running: list[tuple[float, int, float]] = []
    for seconds, share in sorted((job for job in jobs if job[1]), reverse=True):
        while max(free) + 1e-9 < share:
            now, gpu, returned = heapq.heappop(running)
            free[gpu] += returned
        gpu = max(range(gpus), key=free.__getitem__)
        free[gpu] -= share
        heapq.heappush(running, (now + seconds, gpu, share))
    return max([on_cpu, *(end for end, _, _ in running)])
