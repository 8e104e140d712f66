"""Tables of README and jobs/results/README.md, made from JSON: no figure is typed by hand."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import older_digests
from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError
from llava_ray.models.shapes import LLAVA_7B
from llava_ray.models.sizes import Sizes
from llava_ray.report import article
from llava_ray.train.estimate import default_load, estimate

_BLOCK = re.compile(r"(<!-- table: (\w+)((?: \| [^|\n]+?)*) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = (Path("README.md"), Path("jobs/results/README.md"))

_TRAINERS = {
    "plain": "transformers + peft",
    "replica": "**llava_ray**, without DeepSpeed (`train.zero_stage=0`)",
    "zero2": "**llava_ray**, DeepSpeed ZeRO-2",
    "zero3": "**llava_ray**, DeepSpeed ZeRO-3",
}
"""By bench_engines.EngineName."""
_TRAINER_OPTIONS = (
    ("compile", True, "torch.compile"),
    ("liger", True, "Liger kernels"),
    ("fused_layers", False, "peft's layers"),
    ("lora_dropout", True, "LoRA dropout"),
)


def fill(text: str, results: Path) -> str:
    """Write each `<!-- table: name | some row | another -->` block anew, whole or those rows alone.

    A row is named by what its first cell holds. Raises ConfigError for an unknown name, or where
    its JSON is missing.
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ConfigError(f"README asks for table {name!r}: there are {', '.join(TABLES)}")
        file, make = TABLES[name]
        tree = _read(results, file)
        chosen = [part for part in match[3].split(" | ") if part]
        return f"{match[1]}{_only(make(tree), chosen)}\n{_age(file, tree)}{match[4]}"

    return _BLOCK.sub(block, text)


def _only(table: str, chosen: Sequence[str]) -> str:
    """Keep the rows whose first cell is named, all where none is."""
    head, rule, *rows = table.splitlines()
    first = {row: re.sub("[*`]", "", row.split("|")[1]).strip() for row in rows}
    if missing := sorted(set(chosen) - set(first.values())):
        raise ConfigError(f"no row {missing[0]!r} in the table {head!r}")
    return "\n".join([head, rule, *(row for row in rows if not chosen or first[row] in chosen)])


def _read(results: Path, name: str) -> Any:
    path = results / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def _age(file: str, tree: Any) -> str:
    """Say where figures are older than the code; not today's digest, which changes with it."""
    older = older_digests(file, tree)
    if not older:
        return ""
    known = ", ".join(sorted(filter(None, older)))
    if not known:
        return "\n*The results do not say of which code they are: it may have changed since.*\n"
    return f"\n*The code has changed since this was measured (digest then: {known}).*\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _decode(tree: Any) -> str:
    rows = [
        [
            f"{row['layout']}, {row['engine'].replace('llava_ray', '**llava_ray**')}",
            str(row["batch"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['first_token_ms']:.0f}",
            f"{row['warm_up_s']:.0f}",
            f"{row['share_of_bandwidth']:.0%}",
            row["kernel"],
        ]
        for row in tree["rows"]
    ]
    titles = ["weights, engine", "batch", "tok/s", "first token ms", "warm-up s", "bandwidth"]
    return _table([*titles, "kernel"], rows)


def _train(tree: Any) -> str:
    rows = [
        [
            _trainer(row),
            str(row["batch"]),
            {False: "no", True: "yes"}.get(row["checkpointing"], row["checkpointing"]),
            f"{row['samples_per_s']:.1f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        ]
        for row in tree["rows"]
        if not row["failed"]
    ]
    return _table(["trainer", "batch", "checkpointing", "samples/s", "peak GB"], rows)


def _trainer(row: dict[str, Any]) -> str:
    engine = row["engine"]
    if engine not in _TRAINERS:
        known = ", ".join(_TRAINERS)
        raise ConfigError(f"train_h100.json: no engine is called {engine!r}: there are {known}")
    own = [name for key, value, name in _TRAINER_OPTIONS if bool(row[key]) is value]
    own += [f"{row['gpus']} GPUs"] if row["gpus"] > 1 else []
    return " + ".join([_TRAINERS[engine], *own])


def _embedded(tree: Any) -> str:
    rows = [["base, before fine-tuning", "", *_scores(tree["base"])]]
    mean, deviation = tree["fine_tuned_mean"], tree["fine_tuned_standard_deviation"]
    spread = [f"{a} ± {b}" for a, b in zip(_scores(mean), _scores(deviation), strict=True)]
    rows.append([f"fine-tuned, {len(tree['fine_tuned'])} seeds", "", *spread])
    for slug, found in tree["variants"].items():
        if "failed" in found:
            rows.append([slug, "", f"failed: {found['failed']}", "", "", ""])
        else:
            rows.append([slug, f"{found['kl_divergence']:.4f}", *_scores(found["scores"])])
    titles = ["model", "KL nats", "words read", "character errors"]
    titles += ["ROUGE-L against the fine-tune's captions", "CIDEr-D against the same"]
    return _table(titles, rows)


def _hqq_recovery(tree: Any) -> str:
    rows = [["base, before fine-tuning", "", *_scores(tree["base"])]]
    for name, mean in tree["mean"].items():
        deviation = tree["standard_deviation"][name]
        spread = [f"{a} ± {b}" for a, b in zip(_scores(mean), _scores(deviation), strict=True)]
        rows.append([name, f"{mean['kl_divergence']:.4f}", *spread])
    titles = ["model", "KL nats", "words read", "character errors", "ROUGE-L", "CIDEr-D"]
    return _table(titles, rows)


def _scores(scores: dict[str, float]) -> list[str]:
    return [
        f"{scores['word_recall']:.1%}",
        f"{scores['character_error_rate']:.1%}",
        f"{scores['rouge_l']:.3f}",
        f"{scores['cider_d']:.2f}",
    ]


def _stages_7b(tree: Any) -> str:
    rows = []
    for row in tree["stages"]:
        if row["stage"] in ("variant", "benchmark"):
            continue
        what = row["stage"]
        if what == "train":
            what += f", ZeRO-{row['zero_stage']}, {row['num_workers']} GPU(s), {row['steps']} steps"
        elif what == "quantize":
            what += f", {len(row['variant_wall_s'])} variants in parallel"
        peak, rate = row.get("peak_memory_bytes"), row.get("samples_per_s")
        rows.append(
            [
                what,
                f"{row['wall_s']:.0f}",
                "" if peak is None else f"{peak / 1e9:.1f}",
                "" if rate is None else f"{rate:.1f}",
            ]
        )
    return _table(["stage", "seconds", "peak GB a GPU", "samples/s"], rows)


def _variants_7b(tree: Any) -> str:
    stages = tree["stages"]
    cards = {row["slug"]: row for row in stages if row["stage"] == "benchmark"}
    variants = {row["slug"]: row for row in stages if row["stage"] == "variant"}
    rows = []
    for slug, variant in sorted(variants.items(), key=lambda item: -item[1]["size_bytes"]):
        card = cards.get(slug)
        size, rate = article.TABLE.get(slug, (None, None))
        rows.append(
            [
                slug,
                f"{variant['size_bytes'] / 1e9:.2f}",
                _text_model_size(variant),
                _figure(size),
                f"{variant['quantize_s']:.0f}",
                f"{card['decode_tokens_per_s']['median']:.0f}" if card else "not measured",
                _figure(rate),
                f"{card['prefill_s']['median'] * 1e3:.0f}" if card else "",
            ]
        )
    titles = [
        "variant",
        "GB",
        "text model's file",
        "article GB",
        "seconds to make",
        "tok/s",
        "article tok/s",
        "prefill ms",
    ]
    return _table(titles, rows)


def _text_model_size(variant: dict[str, Any]) -> str:
    """Return the GB of a variant's text model, where that is a file of its own (GGUF)."""
    text = [
        size
        for name, size in variant["weight_files"].items()
        if name.endswith(".gguf") and "mmproj" not in name
    ]
    return f"{text[0] / 1e9:.2f}" if text else ""


def _report(tree: Any) -> str:
    rows = []
    for row in tree["rows"]:
        name = f"**{row['slug']}**" if row["status"] == "winner" else row["slug"]
        if row["size_bytes"] is None:
            rows.append([name, row["reason"], "", "", "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{row['decode_tokens_per_s']['median']:.0f}",
                f"{row['kl_divergence']['median']:.4f}",
                f"{row['top1_agreement']:.1%}",
                _figure(row["article_size_gb"]),
                _figure(row["article_tokens_per_s"]),
            ]
        )
    titles = ["variant", "MB", "tok/s", "KL nats", "top-1", "article GB", "article tok/s"]
    return _table(titles, rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _serving(tree: Any) -> str:
    rows = []
    for clients, load in tree["clients"].items():
        for side, name in {"bare": "scheduler and engine alone", "served": "served"}.items():
            first, later = (_percentiles(load[side], key) for key in ("first_token", "per_token"))
            rows.append([clients, name, *first, *later, f"{load[side]['tokens_per_s']:.0f}"])
        added = [f"{load['added_first_token_ms']:.1f}", "", f"{load['added_per_token_ms']:.2f}", ""]
        rows.append([clients, "added", *added, f"{load['throughput_share']:.1%} kept"])
    titles = ["clients", "side", "first token ms, p50", "p99", "ms a token, p50", "p99", "tok/s"]
    return _table(titles, rows)


def _percentiles(side: dict[str, float], key: str) -> list[str]:
    """Return p50 and p99 in ms; a file without p99 holds the median by the plain name."""
    return [
        _ms(side.get(f"{key}_p50_ms", side.get(f"{key}_ms"))),
        _ms(side.get(f"{key}_p99_ms")),
    ]


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


_GIGABYTES = ("disk_bytes", "memory_bytes")


def _costs(tree: Any) -> str:
    rows = []
    for row in tree["rows"]:
        seconds, parts = row["seconds"], row.get("parts", {})
        rows.append(
            [
                f"`{row['command']}`",
                f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s",
                ", ".join(f"{name.removesuffix('_s')} {s:.0f}" for name, s in parts.items() if s),
                *(f"{row[key] / 1e9:.1f}" if key in row else "" for key in _GIGABYTES),
            ]
        )
    return _table(["command", "time", "of which, in seconds", "disk GB", "memory GB"], rows)


_RUNS: Mapping[str, tuple[int, list[str]]] = {
    "one GPU of 24 GB": (1, ["train.method=qlora", "train.precision=bf16"]),
    "one GPU of 80 GB": (1, ["train.zero_stage=0", "train.batch_size=8", "train.precision=bf16"]),
    "four GPUs of 24 GB, as the article": (4, ["train.zero_stage=3", "train.precision=fp16"]),
    "eight GPUs of 80 GB": (8, ["train.batch_size=8", "train.precision=bf16"]),
}


def _hardware(tree: Any) -> str:
    """Estimate what the 7B's training needs; hours only where a GPU's speed was measured."""
    speeds = {r["name"]: r["samples_per_s"] for r in tree["rows"] if not r["failed"]}
    sizes, rows = Sizes.of(LLAVA_7B), []
    for name, (workers, overrides) in _RUNS.items():
        train = load_config(None, overrides).train
        memory = estimate(sizes, train, workers=workers,
                          load=default_load(sizes, train))  # fmt: skip
        engine = {0: "replica", 2: "zero2", 3: "zero3"}[train.zero_stage]
        speed = speeds.get(f"{engine}-b{train.batch_size}") if workers == 1 else None
        rows.append([
            name, f"`{' '.join(overrides)}`", f"{memory.gpu / 1e9:.1f}",
            "" if speed is None or train.method != "lora" else f"{10_000 / speed / 3600:.2f}",
        ])  # fmt: skip
    return _table(["GPUs", "settings", "GB a GPU", "hours for 10,000 captions, H100"], rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "costs": ("costs", _costs),
    "decode": ("decode_h100", _decode),
    "embedded": ("embedded", _embedded),
    "hardware": ("train_h100", _hardware),
    "hqq_recovery": ("hqq_recovery", _hqq_recovery),
    "photographs": ("photographs_report", _report),
    "quickstart": ("quickstart_report", _report),
    "serving": ("serving", _serving),
    "serving_7b": ("serving_7b_h100", _serving),
    "stages_7b": ("llava_7b_h100", _stages_7b),
    "train": ("train_h100", _train),
    "variants_7b": ("llava_7b_h100", _variants_7b),
}
"""By name: the results file, without `.json`, and what makes the table of it."""
