"""Write a plan as a table for people."""

from argparse import Namespace

from llava_ray.cluster.groups import read_groups
from llava_ray.cluster.plan import (
    Interruptions,
    Market,
    Prediction,
    markets_of,
    predict,
    unmeasured,
)
from llava_ray.cluster.rates import measured_rates, read_rates
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEW_STEPS = 100

_HEAD = (
    f"{'GPUs':>5} {'nodes':>5} {'steps':>7} {'train':>9} {'efficiency':>10} {'quantize':>9} "
    f"{'benchmark':>9} {'total':>9} {'GPU-hours':>9} {'USD':>8}"
)


def plan_table(config: RunConfig, args: Namespace) -> str:
    """Return one table per node group with GPUs, and what is left out.

    Raises ConfigError for missing rates or a cluster without GPUs.
    """
    if args.samples < 1:
        raise ConfigError(f"--samples {args.samples}: at least 1")
    cluster = read_groups(args.cluster)
    rates = measured_rates(args.measured) if args.measured else read_rates(args.rates)
    interruptions = Interruptions(args.interruptions, args.restart_s, args.checkpoint_every_s)
    lines = [f"rates: {rates.accelerator}; {rates.how}"]
    for market in markets_of(cluster):
        rows = [
            predict(
                config,
                market,
                rates,
                samples=args.samples,
                gpus=count,
                relative_speed=args.relative_speed,
                interruptions=interruptions,
            )
            for count in GPU_COUNTS
        ]
        lines += ["", _title(market), _HEAD, *(_line(row, market) for row in rows)]
        if market.usd_per_hour is None:
            lines.append(f"no price: set metadata.usd_per_hour.{market.group.name}")
    lines += ["", f"not measured, not counted: {'; '.join(unmeasured(config, rates))}"]
    return "\n".join(lines)


def _title(market: Market) -> str:
    kind = "spot" if market.group.spot else "on demand"
    return (
        f"{market.group.name}: {market.group.gpus:g} {market.accelerator} per node, {kind}, "
        f"{market.network_gbps:g} Gbit/s between nodes"
    )


def _line(row: Prediction, market: Market) -> str:
    notes = []
    if row.nodes > market.group.max_count:
        notes.append(f"max_workers is {market.group.max_count}")
    if row.optimizer_steps < FEW_STEPS:
        notes.append("few steps: lower the batch or train longer")
    hours = "never" if row.gpu_hours is None else f"{row.gpu_hours:.2f}"
    usd = "" if row.usd is None else f"{row.usd:.2f}"
    text = (
        f"{row.gpus:>5} {row.nodes:>5} {row.optimizer_steps:>7} {_time(row.train_s):>9} "
        f"{row.efficiency:>10.0%} {_time(row.quantize_s):>9} {_time(row.benchmark_s):>9} "
        f"{_time(row.total_s):>9} {hours:>9} {usd:>8}"
    )
    return f"{text}  {'; '.join(notes)}".rstrip()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    if not seconds:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"
