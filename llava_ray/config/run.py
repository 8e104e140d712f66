"""One config for the whole line: YAML plus overrides such as `train.learning_rate=1e-4`.

All mistakes are reported at once, before a worker is asked for.
"""

import contextlib
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from llava_ray.config.section import Count, Integer, Natural, NotNegative, Positive, Section, Share
from llava_ray.config.train import TrainConfig as TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.shipped import or_shipped

Stage = Literal["prepare", "sweep", "train", "merge", "quantize", "benchmark", "choose", "deploy"]


class StorageConfig(Section):
    """Where artifacts live."""

    uri: str = Field(default="~/llava_ray_runs", min_length=1)
    """A path, or an fsspec URI such as s3://bucket/prefix that every node reaches."""
    force: tuple[Stage, ...] = Field(default=())
    """Stages whose finished artifacts are deleted, with all that was made from them, and made
    anew."""


class ModelConfig(Section):
    """The base model."""

    path: str = Field(default="embedded")
    """`embedded` (the tiny reading LLaVA of this package), a folder or a Hugging Face id."""
    revision: str | None = Field(default=None)
    """Commit or tag of a Hugging Face id."""
    system_prompt: str = Field(default="")
    """Text before the first USER turn; LLaVA's own trainer uses Vicuna's, llava-hf none."""


class MixConfig(Section):
    """One of several sources; what it leaves out is as in data."""

    source: str = Field(min_length=1)
    weight: Positive = Field(default=1)
    """How often each of its rows is trained on in an epoch; 0.5: every other one, by chance."""
    images: str | None = Field(default=None)
    split: str | None = Field(default=None)
    image_column: str | None = Field(default=None)
    caption_column: str | None = Field(default=None)
    question: str | None = Field(default=None)
    limit: Integer | None = Field(default=None, ge=2)


class DataConfig(Section):
    """Captions and images."""

    source: str = Field(default="scene-text", min_length=1)
    """`scene-text` (generated), a Hugging Face id, or a path or fsspec URI: of a file (.jsonl,
    .json, .csv, .parquet, .tar) or a folder (such files, an imagefolder, save_to_disk, pictures
    with .txt captions)."""
    images: str | None = Field(default=None)
    """Folder of the image files, a path or an fsspec URI; default: a column with the images
    themselves, else the source's own folder."""
    split: str = Field(default="train")
    """Split of a Hugging Face id or of a save_to_disk folder."""
    image_column: str | None = Field(default=None)
    """Default: a column with images in it, else one known by its name, such as file_name."""
    caption_column: str | None = Field(default=None)
    """Default: conversations or messages, else a column known by its name, such as caption."""
    question: str = Field(default="Describe this image in detail.")
    """What is asked of an image that comes with a caption alone."""
    limit: Integer | None = Field(default=None, ge=2)
    """Take only the first rows; for scene-text how many are drawn (default 240)."""
    test_share: Share = Field(default=0.1)
    max_rejected_share: Share = Field(default=0.05)
    """More rejected rows than this share end the stage with the list of reasons."""
    max_image_pixels: Count = Field(default=50_000_000)
    """Larger images are rejected before they are decoded."""
    seed: Integer = Field(default=0)
    mix: tuple[MixConfig, ...] = Field(default=())
    """Several sources in place of `source`, such as [{source: a.csv}, {source: b, weight: 0.5}]."""

    def parts(self) -> "list[tuple[DataConfig, float]]":
        """Return each source's settings and its weight."""
        if not self.mix:
            return [(self, 1.0)]
        return [
            (self.model_copy(update={**part.model_dump(exclude_none=True), "mix": ()}), part.weight)
            for part in self.mix
        ]

    @property
    def named(self) -> str:
        """The sources, for people."""
        return ", ".join(part.source for part, _ in self.parts())


class SweepConfig(Section):
    """A search over the train section, through Ray Tune."""

    space: dict[str, Any] = Field(default_factory=dict)
    """What each key of train is drawn from: {grid: [...]}, {choice: [...]}, {uniform: [a, b]},
    {loguniform: [a, b]}."""
    num_trials: Count = Field(default=8)
    """Samples drawn. A grid alone is walked once; beside other entries, once for each sample."""
    scheduler: Literal["asha", "pbt", "fifo"] = Field(default="asha")
    search: Literal["random", "optuna"] = Field(default="random")
    objective: str = Field(default="eval_loss")
    """`eval_loss`, a caption score of the held-out split (`rouge_l`, `cider_d`, `word_recall`,
    `character_error_rate`), or such a score `after <variant slug>`: of the quantized model."""
    max_concurrent_trials: Count | None = Field(default=None)
    """Default: as many as the cluster's GPUs (or CPUs) hold."""
    seed: Integer = Field(default=0)


class MergeConfig(Section):
    """Folding the adapter into the base, in fp32."""

    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="fp16")
    """The dtype of the weights written."""
    probe_samples: Count = Field(default=4)
    """Held-out samples on which logits before and after are compared."""


class QuantizeConfig(Section):
    """Which variants are made."""

    variants: tuple[str, ...] = Field(
        default=(
            "none-fp16", "bnb-int8", "bnb-nf4", "bnb-fp4",
            "hqq-w8-g64", "hqq-w4-g64", "hqq-w3-g64", "hqq-w2-g64", "hqq-w1-g64",
            "gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k",
            "awq-w4-g128",
        )
    )  # fmt: skip
    """Slugs; `llava-ray quantize --list` names all."""
    on_unsupported: Literal["strike", "error"] = Field(default="strike")
    """What becomes of slugs that the base model cannot have, known before anything runs: a warning
    now and a failed variant later, or an error."""
    calibration_samples: Count = Field(default=32)
    """Training samples that calibrated methods (AWQ) see."""
    max_parallel: Count | None = Field(default=None)
    """Variants made at a time; default: what the cluster's resources allow."""


class BenchmarkConfig(Section):
    """How variants are measured."""

    baseline: str = Field(default="none-fp16")
    """The variant that fidelity is measured against."""
    fidelity_samples: Count = Field(default=16)
    """Held-out samples whose captions are teacher-forced."""
    caption_samples: Count = Field(default=16)
    """Held-out samples that are generated and scored."""
    shown_samples: Count = Field(default=4)
    """Generations that the report shows."""
    max_new_tokens: Count = Field(default=96)
    decode_tokens: Count = Field(default=48)
    """Tokens of one timed generation."""
    warmup: Natural = Field(default=1)
    repeats: Count = Field(default=3)
    device: str = Field(default="auto", min_length=1)
    """`cpu`, `cuda`, a part of a device's name such as H100, or `auto`: as resources.accelerator.
    A name decides where variants were measured on several."""
    max_parallel: Count | None = Field(default=None)
    """Variants measured at a time; default: as many as there are CPUs (models below 1 GiB) or
    GPUs for. Each is timed while no other on its machine is at work."""

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if device.lower() in ("gpu", "cuda:0", "tpu", "mps"):
            raise ValueError(f"{device!r} is not one: give auto, cpu, cuda or a name such as H100")
        return device


class ChooseConfig(Section):
    """Limits that the winner keeps, and what decides among those that keep them."""

    max_kl_divergence: Positive | None = Field(default=0.1)
    """Nats per token against the baseline."""
    min_decode_tokens_per_s: Positive | None = Field(default=None)
    max_size_bytes: Count | None = Field(default=None)
    prefer: Literal["size", "speed", "fidelity"] = Field(default="speed")
    may_choose_baseline: bool = Field(default=False)


class EndpointConfig(Section):
    """An endpoint's replicas and what they accept, as a run and a Serve application set it."""

    api_key_env: str = Field(default="LLAVA_RAY_API_KEY")
    """Environment variable with the API key; needed unless host is a loopback address."""
    min_replicas: Count = Field(default=1)
    max_replicas: Count = Field(default=1)
    cpus_per_replica: Positive = Field(default=1)
    context: Count = Field(default=2048)
    """Tokens of one conversation, its images included; less where the model has less. Memory grows
    with it times max_concurrent_requests."""
    max_concurrent_requests: Count = Field(default=16)
    """Answers of each model that one replica works on at a time; fewer where memory is short."""
    max_queued_requests: Count = Field(default=64)
    """Requests that wait in a replica; more are refused with 429."""
    max_new_tokens: Count = Field(default=1024)
    request_timeout_s: Positive = Field(default=120)
    step_timeout_s: Positive = Field(default=120, ge=1)
    """An engine that takes no step for so long is started again."""
    max_images: Count = Field(default=8)
    """Of one request, as far as the context goes."""
    max_image_bytes: Count = Field(default=10_000_000)
    max_image_pixels: Count = Field(default=40_000_000)
    image_hosts: tuple[str, ...] = Field(default=())
    """Hosts whose image URLs are fetched, such as images.example.com; default: data URLs only."""

    @field_validator("image_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"(\[[\da-f:.]+\]|[a-z\d._-]+)(:\d{1,5})?", host):
                raise ValueError(f"{host!r} is no host, such as images.example.com or host:8080")
        return hosts


class ServeConfig(EndpointConfig):
    """The endpoint."""

    host: str = Field(default="127.0.0.1")
    port: Integer = Field(default=8000, ge=1, le=65535)
    model_name: str | None = Field(default=None)
    """Default: the variant's slug."""
    gpus_per_replica: NotNegative | None = Field(default=None)
    """Default: 1 with GPUs (see resources.accelerator), shared where replicas are more, else 0."""
    proxy: Literal["python", "haproxy"] = Field(default="python")
    """What takes HTTP in: Ray Serve's own proxy, or HAProxy, which is faster but also binds pages
    about itself to all interfaces: a firewall has to close their ports."""
    beside: tuple[str, ...] = Field(default=())
    """Slugs of further variants, served under their slugs as `model`."""
    canary: str | None = Field(default=None)
    """One of `beside` that answers a share of the winner's requests unseen, to be compared."""
    canary_share: Share = Field(default=0.1)

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}: "
                "raise the latter"
            )
        if self.canary is not None and self.canary not in self.beside:
            raise ValueError(f"canary {self.canary!r} is not in beside: add it")
        if self.model_name in self.beside:
            raise ValueError(f"model_name {self.model_name!r} is a slug in beside: take another")
        return self


class NodeTypeConfig(Section):
    """Nodes of one kind that the cluster can have."""

    name: str = Field(default="worker")
    num_cpus: NotNegative
    num_gpus: NotNegative = Field(default=0)
    memory_bytes: NotNegative = Field(default=0)
    """0: not known."""
    max_count: Count = Field(default=1)


class ResourcesConfig(Section):
    """What nodes the stages may ask for, and how long they wait for them."""

    node_types: str | tuple[NodeTypeConfig, ...] | None = Field(default=None)
    """A cluster YAML such as cluster/aws.yaml, or a list of {num_cpus, num_gpus, memory_bytes,
    max_count}; `up`: no node comes but those that are up. Default: what the cluster was started
    with ($LLAVA_RAY_NODE_TYPES), else a stage asks for what it needs and waits."""
    accelerator: Literal["auto", "gpu", "cpu"] = Field(default="auto")
    """`auto`: GPUs where a node type has them, else CPUs, but for large models."""
    wait_s: Positive = Field(default=1800)
    """How long a stage waits for nodes while none is at work for it."""


class RunConfig(Section):
    """The whole line; every stage reads its own section."""

    storage: StorageConfig = Field(default_factory=StorageConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    merge: MergeConfig = Field(default_factory=MergeConfig)
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    benchmark: BenchmarkConfig = Field(default_factory=BenchmarkConfig)
    choose: ChooseConfig = Field(default_factory=ChooseConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.benchmark.baseline not in self.quantize.variants:
            raise ValueError(
                f"benchmark.baseline {self.benchmark.baseline!r} is not in quantize.variants: "
                "add it there"
            )
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or the defaults), apply `section.key=value` overrides and validate.

    Raises ConfigError that lists every mistake, with the nearest known key for unknown ones.
    """
    tree = _read_yaml(path) if path else {}
    mistakes = [m for text in overrides if (m := _apply(tree, text))]
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        mistakes += [_explain(item) for item in error.errors()]
    if mistakes:
        where = f"{path}: " if path else ""
        raise ConfigError(where + "; ".join(mistakes))
    return config


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return the config with other values of some keys, by section."""
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] |= values
    return RunConfig.model_validate(tree)


def to_yaml(config: RunConfig) -> str:
    """Write a config so that `load_config` reads the same one back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def known_keys() -> list[str]:
    """Return every dotted key, sections left out."""
    tree = RunConfig().model_dump()
    return [f"{section}.{key}" for section, keys in tree.items() for key in keys]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(or_shipped(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {path}: give --config an existing YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections such as 'train:'")
    return tree


def _apply(tree: dict[str, Any], text: str) -> str | None:
    """Set one override in the tree; return the mistake, if any."""
    key, equals, value = text.partition("=")
    if not equals:
        return f"override {text!r} has no '=': write section.key=value"
    *sections, last = key.split(".")
    parsed: Any = value
    kinds = _kinds(sections, last)
    # Of a key that is a text or a list, such as resources.node_types.
    is_list = value.lstrip().startswith("[") and any(get_origin(kind) is tuple for kind in kinds)
    if str not in kinds or is_list or (value == "null" and NoneType in kinds):
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            return f"override {text!r}: the value is not YAML"
        # YAML 1.1 reads 1e-4 (without a dot) as text.
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            return f"override {text!r}: {section!r} is not a section"
        node = child
    node[last] = parsed
    return None


def _kinds(sections: Sequence[str], last: str) -> tuple[Any, ...]:
    """Return the types that a key takes.

    A key of text takes it as typed, whatever YAML would make of it; only `null` is none, where the
    key need not be set.
    """
    model: Any = RunConfig
    for section in sections:
        found = getattr(model, "model_fields", {}).get(section)
        model = found and found.annotation
    field = getattr(model, "model_fields", {}).get(last)
    kind = None if field is None else field.annotation
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


_TYPES = {
    "tuple_type": "give a list, such as [a, b]",
    "model_type": "give a section's keys, such as section.key=value",
    "float_parsing": "give a number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "bool_parsing": "give true or false",
    "string_type": "give text",
    "string_too_short": "give text that is not empty",
}
"""Instead of pydantic's words for kinds of mistakes."""


def _explain(item: Any) -> str:
    key, kind = ".".join(str(part) for part in item["loc"]), item["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{key}'{hint}"
    message: str = _TYPES.get(kind, item["msg"].removeprefix("Value error, "))
    if not key:
        return message
    return f"{key}: {message}" if kind == "value_error" else f"{key}={item['input']!r}: {message}"
