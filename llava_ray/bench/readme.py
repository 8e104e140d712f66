"""Tables of README and jobs/results/README.md, made from JSON: no figure is typed by hand."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.artifacts.code_digest import older_digests
from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError
from llava_ray.models.shapes import LLAVA_7B
from llava_ray.models.sizes import Sizes
from llava_ray.prepare.readers import readers
from llava_ray.report import article
from llava_ray.train.estimate import default_load, estimate

_BLOCK = re.compile(r"(<!-- table: (\w+)((?: \| [^|\n]+?)*) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = (Path("README.md"), Path("jobs/results/README.md"))


def fill(text: str, results: Path) -> str:
    """Write each `<!-- table: name | some row | another -->` block anew, whole or those rows alone.

    A row is named by what its first cell holds. Raises ConfigError for an unknown name, or where
    its JSON is missing.
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name == "forms":
            return f"{match[1]}{_forms()}\n{match[4]}"
        if name not in TABLES:
            raise ConfigError(f"README asks for table {name!r}: there are {', '.join(TABLES)}")
        file, make = TABLES[name]
        tree = _read(results / f"{file}.json")
        chosen = [part for part in match[3].split(" | ") if part]
        return f"{match[1]}{_only(make(tree), chosen)}\n{_age(file, tree)}{match[4]}"

    return _BLOCK.sub(block, text)


def table(name: str, results: Path) -> str:
    """Return the table of that name, made from a results file."""
    return TABLES[name][1](_read(results))


def _only(table: str, chosen: Sequence[str]) -> str:
    """Keep the rows whose first cell is named, all where none is."""
    head, rule, *rows = table.splitlines()
    first = {row: re.sub("[*`]", "", row.split("|")[1]).strip() for row in rows}
    if missing := sorted(set(chosen) - set(first.values())):
        raise ConfigError(f"no row {missing[0]!r} in the table {head!r}")
    return "\n".join([head, rule, *(row for row in rows if not chosen or first[row] in chosen)])


def _read(path: Path) -> Any:
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


@dataclass(frozen=True)
class Column:
    """A column of a table with a row per row of the results."""

    title: str
    value: str | Callable[[Any], Any]
    """A key, with dots into what it holds, or what computes the value."""
    form: str = ""
    unit: float | None = None
    missing: str = ""

    def cell(self, row: Any) -> str:
        """Return the row's cell."""
        found = row
        if callable(self.value):
            found = self.value(row)
        else:
            for key in self.value.split("."):
                found = (found or {}).get(key)
        if found is None:
            return self.missing
        return format(found / self.unit if self.unit else found, self.form)


def _by_row(
    *columns: Column, rows: Callable[[Any], Iterable[Any]] = lambda tree: tree["rows"]
) -> Callable[[Any], str]:
    """Return what makes a table of these columns from a results file's rows."""
    titles = [column.title for column in columns]
    return lambda tree: _table(titles, [[c.cell(row) for c in columns] for row in rows(tree)])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _forms() -> str:
    """Return the forms of data that the readers know."""
    rows = [[f"`{suffix}`", reader.form] for suffix, reader in readers().items()]
    folder = (
        "files of one of these kinds, an imagefolder with `metadata.jsonl` or `.csv`, what "
        "`save_to_disk` wrote, or pictures with a `.txt` of the same name each"
    )
    hub = "a data set of the hub with images, or their file names, and captions"
    rows += [["a folder", folder], ["a Hugging Face id", hub]]
    return _table(["data.source", "what it holds"], rows).replace("---:", "---")


_TRAINERS = {
    "plain": "transformers + peft",
    "replica": "**llava_ray**, without DeepSpeed",
    "zero2": "**llava_ray**, DeepSpeed ZeRO-2",
    "zero3": "**llava_ray**, DeepSpeed ZeRO-3",
}
"""By train_rows.EngineName."""
_TRAINER_OPTIONS = (
    ("compile", True, "torch.compile"),
    ("liger", True, "Liger kernels"),
    ("fused_layers", False, "peft's layers"),
    ("lora_dropout", True, "LoRA dropout"),
    ("fp16", True, "fp16"),
    ("ray", True, "started by Ray Train"),
)
_CHECKPOINTING = {False: "no", True: "yes", "mlp": "mlp"}


def _trainer(row: dict[str, Any]) -> str:
    own = [name for key, value, name in _TRAINER_OPTIONS if bool(row.get(key, not value)) is value]
    own += [f"{row['accumulation']} batches a step"] if row.get("accumulation", 1) > 1 else []
    own += [f"{row['gpus']} GPUs"] if row["gpus"] > 1 else []
    return " + ".join([_TRAINERS[row["engine"]], *own])


_SCORES = {"word_recall": ".1%", "character_error_rate": ".1%", "rouge_l": ".3f", "cider_d": ".2f"}
_SCORED = ["model", "KL nats", "words read", "character errors"]


def _embedded(tree: Any) -> str:
    tuned = f"fine-tuned, {len(tree['fine_tuned'])} seeds"
    rows = [
        _scored("base, before fine-tuning", tree["base"]),
        _scored(tuned, tree["fine_tuned_mean"], tree["fine_tuned_standard_deviation"]),
    ]
    for slug, found in tree["variants"].items():
        if "failed" in found:
            rows.append([slug, "", f"failed: {found['failed']}", "", "", ""])
        else:
            rows.append(_scored(slug, found["scores"], kl=found["kl_divergence"]))
    titles = ["ROUGE-L against the fine-tune's captions", "CIDEr-D against the same"]
    return _table([*_SCORED, *titles], rows)


def _hqq_recovery(tree: Any) -> str:
    rows = [_scored("base, before fine-tuning", tree["base"])]
    for name, mean in tree["mean"].items():
        rows.append(_scored(name, mean, tree["standard_deviation"][name], mean["kl_divergence"]))
    return _table([*_SCORED, "ROUGE-L", "CIDEr-D"], rows)


def _scored(
    name: str, scores: Mapping[str, float], deviation: Mapping[str, float] | None = None,
    kl: float | None = None,
) -> list[str]:  # fmt: skip
    cells = [format(scores[key], form) for key, form in _SCORES.items()]
    if deviation is not None:
        spread = [format(deviation[key], form) for key, form in _SCORES.items()]
        cells = [f"{cell} ± {more}" for cell, more in zip(cells, spread, strict=True)]
    return [name, "" if kl is None else f"{kl:.4f}", *cells]


def _stage(row: Any) -> str:
    if row["stage"] == "train":
        return "train, ZeRO-{zero_stage}, {num_workers} GPU(s), {steps} steps".format(**row)
    if row["stage"] == "quantize":
        return f"quantize, {len(row['variant_wall_s'])} variants in parallel"
    return str(row["stage"])


def _by_size(tree: Any) -> list[dict[str, Any]]:
    """Return the variants, each with its scorecard and the article's figures."""
    stages = tree["stages"]
    cards = {row["slug"]: row for row in stages if row["stage"] == "benchmark"}
    # By slug, so that a variant that was made twice is one row.
    variants = {row["slug"]: row for row in stages if row["stage"] == "variant"}
    rows = [
        {**row, "card": cards.get(slug), "article": article.TABLE.get(slug)}
        for slug, row in variants.items()
    ]
    return sorted(rows, key=lambda row: -row["size_bytes"])


def _text_model_bytes(variant: Any) -> int | None:
    """Return the size of a variant's text model, where that is a file of its own (GGUF)."""
    files = variant["weight_files"].items()
    texts = (size for name, size in files if name.endswith(".gguf") and "mmproj" not in name)
    return next(texts, None)


def _serving(tree: Any) -> str:
    rows = []
    for way, clients in tree["ways"].items():
        for count, load in clients.items():
            sides = [load["bare"], load["served"]]
            cells = [_percentiles(sides, f"{key}_{p}_ms") for key in _TIMES for p in ("p50", "p99")]
            added = [f"{load[f'added_{key}_ms']:+.{d}f} ms" for key, d in _TIMES.items()]
            rows.append([way, count, *cells, *added, f"{load['throughput_share']:.1%}"])
    return _table(
        ["behind", "clients", "first token ms, p50", "p99", "ms a token, p50", "p99",
         "added to the first", "to a token", "throughput kept"],
        rows,
    )  # fmt: skip


_TIMES = {"first_token": 1, "per_token": 2}
"""Decimals of what serving adds, by what is timed."""


def _percentiles(sides: Sequence[Mapping[str, float]], key: str) -> str:
    """Return the bare engine's and the served one's times."""
    values = (side.get(key) for side in sides)
    return " / ".join("-" if v is None else f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values)


def _plain(tree: Any) -> str:
    """Show a file's rows as they are."""
    titles = list(dict.fromkeys(key for row in tree["rows"] for key in row if key != "code_digest"))
    return _table(titles, [[_cell(row.get(title, "")) for title in titles] for row in tree["rows"]])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value / 1e9:.1f} GB" if isinstance(value, int) and value > 10**8 else str(value)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _parts(row: Any) -> str:
    parts = row.get("parts", {}).items()
    return ", ".join(f"{name.removesuffix('_s')} {s:.0f}" for name, s in parts if s)


_RUNS: Mapping[str, tuple[int, list[str]]] = {
    "one GPU of 24 GB": (1, ["train.method=qlora", "train.precision=bf16"]),
    "one GPU of 80 GB": (1, ["train.batch_size=8", "train.precision=bf16"]),
    "four GPUs of 24 GB, as the article": (4, ["train.zero_stage=3", "train.precision=fp16"]),
    "eight GPUs of 80 GB": (8, ["train.batch_size=8", "train.precision=bf16"]),
}


def _hardware(tree: Any) -> str:
    """Estimate what the 7B's training needs; hours only where a GPU's speed was measured."""
    speeds = {r["name"]: r["samples_per_s"] for r in tree["rows"] if not r["failed"]}
    sizes, rows = Sizes.of(LLAVA_7B), []
    for name, (workers, overrides) in _RUNS.items():
        train = load_config(None, overrides).train
        load = default_load(sizes, train)
        memory = estimate(sizes, train, workers=workers, load=load).gpu
        engine = {0: "replica", 2: "zero2", 3: "zero3"}[train.stage_for(workers)]
        measured = workers == 1 and train.method == "lora"
        speed = speeds.get(f"{engine}-b{train.batch_size}") if measured else None
        hours = "" if speed is None else f"{10_000 / speed / 3600:.2f}"
        rows.append([name, f"`{' '.join(overrides)}`", f"{memory / 1e9:.1f}", hours])
    return _table(["GPUs", "settings", "GB a GPU", "hours for 10,000 captions, H200"], rows)


_COSTS = _by_row(
    Column("command", lambda row: f"`{row['command']}`"),
    Column("time", lambda row: _time(row["seconds"])),
    Column("of which, in seconds", _parts),
    Column("disk GB", "disk_bytes", ".1f", 1e9),
    Column("memory GB", "memory_bytes", ".1f", 1e9),
)
_DECODE = _by_row(
    Column(
        "weights, engine",
        lambda row: f"{row['layout']}, {row['engine'].replace('llava_ray', '**llava_ray**')}",
    ),
    Column("batch", "batch"),
    Column("tok/s", "tokens_per_s", ".0f"),
    Column("with prefill", "total_tokens_per_s", ".0f"),
    Column("first token ms", "first_token_ms", ".0f"),
    Column("warm-up s", "warm_up_s", ".0f"),
    Column("bandwidth", "share_of_bandwidth", ".0%"),
    Column("kernel", "kernel"),
)
_ELSEWHERE = _by_row(
    Column("variant", "variant"),
    Column("by", "reader"),
    Column("transformers", "versions.transformers"),
    Column("pictures", "pictures"),
    Column("the engine's answer", lambda row: row.get("failed") or str(row["same_answers"])),
)
_SIZE = Column("", "size_bytes", ".1f", 1e6)
_REPORT = _by_row(
    Column("variant", lambda r: f"**{r['slug']}**" if r["status"] == "winner" else r["slug"]),
    Column("MB", lambda row: _SIZE.cell(row) or row["reason"]),
    Column("tok/s", "decode_tokens_per_s.median", ".0f"),
    Column("KL nats", "kl_divergence.median", ".4f"),
    Column("top-1", "top1_agreement", ".1%"),
    Column("article GB", "article_size_gb", "g"),
    Column("article tok/s", "article_tokens_per_s", "g"),
)
_STAGES_7B = _by_row(
    Column("stage", _stage),
    Column("seconds", "wall_s", ".0f"),
    Column("peak GB a GPU", "peak_memory_bytes", ".1f", 1e9),
    Column("samples/s", "samples_per_s", ".1f"),
    rows=lambda tree: (
        row for row in tree["stages"] if row["stage"] not in ("variant", "benchmark")
    ),
)
_STORAGE = _by_row(
    Column("direction", "direction"),
    Column("files/s, one at a time", "one_by_one_files_per_s", ".0f"),
    Column("files/s, **llava_ray**", "files_per_s", ".0f"),
    Column("times faster", "times_faster", ".1f"),
)
_TRAIN = _by_row(
    Column("trainer", _trainer),
    Column("batch", "batch"),
    Column("checkpointing", lambda row: _CHECKPOINTING[row["checkpointing"]]),
    Column("samples/s", "samples_per_s", ".1f"),
    Column("peak GB", "peak_bytes", ".1f", 1e9),
    rows=lambda tree: (row for row in tree["rows"] if not row["failed"]),
)
_VARIANTS_7B = _by_row(
    Column("variant", "slug"),
    Column("GB", "size_bytes", ".2f", 1e9),
    Column("text model's file", _text_model_bytes, ".2f", 1e9),
    Column("article GB", lambda row: row["article"] and row["article"][0], "g"),
    Column("seconds to make", "quantize_s", ".0f"),
    Column("tok/s", "card.decode_tokens_per_s.median", ".0f", missing="not measured"),
    Column("article tok/s", lambda row: row["article"] and row["article"][1], "g"),
    Column("prefill ms", "card.prefill_s.median", ".0f", 1e-3),
    rows=_by_size,
)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "costs": ("costs", _COSTS),
    "decode": ("decode_h100", _DECODE),
    "elsewhere": ("elsewhere", _ELSEWHERE),
    "embedded": ("embedded", _embedded),
    "families": ("families", _plain),
    "families_gpu": ("families_h100", _plain),
    "hardware": ("train_h100", _hardware),
    "hqq_recovery": ("hqq_recovery", _hqq_recovery),
    "photographs": ("photographs_report", _REPORT),
    "prepare": ("prepare", _plain),
    "quickstart": ("quickstart_report", _REPORT),
    "serving": ("serving", _serving),
    "serving_7b": ("serving_7b_h100", _serving),
    "serving_faults": ("serving_faults", _plain),
    "serving_memory": ("serving_memory_h100", _plain),
    "stages_7b": ("llava_7b_h100", _STAGES_7B),
    "storage": ("storage", _STORAGE),
    "train": ("train_h100", _TRAIN),
    "variants_7b": ("llava_7b_h100", _VARIANTS_7B),
}
"""By name: the results file, without `.json`, and what makes the table of it."""
