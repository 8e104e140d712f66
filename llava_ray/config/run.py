"""One config for the whole line: YAML plus overrides such as `train.learning_rate=1e-4`.

All mistakes are reported at once, before a worker is asked for.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from llava_ray.config.overrides import load_section, read_yaml
from llava_ray.config.section import Count, Integer, Natural, NotNegative, Positive, Section, Share
from llava_ray.config.train import TrainConfig as TrainConfig
from llava_ray.errors import ConfigError

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
    weight: Positive = Field(default=1, le=1000)
    """How often each of its rows is trained on in an epoch; 0.5: every other one, by chance."""
    images: str | None = Field(default=None)
    split: str | None = Field(default=None)
    image_column: str | None = Field(default=None)
    caption_column: str | None = Field(default=None)
    question_column: str | None = Field(default=None)
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
    question_column: str | None = Field(default=None)
    """Default: one known by its name, such as question or prompt."""
    question: str = Field(default="Describe this image in detail.")
    """What is asked of an image that comes with a caption alone."""
    limit: Integer | None = Field(default=None, ge=2)
    """Take only the first rows; for scene-text how many are drawn (default 240)."""
    test_share: Share = Field(default=0.1)
    """Of the rows; each side has at least one."""
    max_rejected_share: Share = Field(default=0.05)
    """More rejected rows than this share end the stage with the list of reasons."""
    max_image_pixels: Count = Field(default=50_000_000)
    """Larger images are rejected before they are decoded."""
    seed: Integer = Field(default=0)
    cache_bytes: Natural = Field(default=100_000_000_000)
    """What a training node may keep of a prepared data set on remote storage; of a larger one it
    reads each row by range whenever the row is trained on."""
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


Reader = Literal[
    "transformers-4", "transformers-5", "vllm", "sglang", "lmdeploy", "llama.cpp", "ollama"
]
"""Programs that others open a variant's folder with."""


class ChooseConfig(Section):
    """Limits that the winner keeps, and what decides among those that keep them."""

    max_kl_divergence: Positive | None = Field(default=0.1)
    """Nats per token against the baseline."""
    min_decode_tokens_per_s: Positive | None = Field(default=None)
    max_size_bytes: Count | None = Field(default=None)
    prefer: Literal["size", "speed", "fidelity"] = Field(default="speed")
    may_choose_baseline: bool = Field(default=False)
    must_open_in: tuple[Reader, ...] = Field(default=())
    """Programs that the winner's passport must not say refuse it."""


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
    canary: str | None = Field(default=None)
    """A further served model that answers a share of the first one's requests unseen, to be
    compared; of a run one of serve.beside."""
    canary_share: Share = Field(default=0.1)
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
    try:
        return load_section(RunConfig, read_yaml(path) if path else {}, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return the config with other values of some keys, by section."""
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] |= values
    return RunConfig.model_validate(tree)


def to_yaml(config: RunConfig) -> str:
    """Write a config so that `load_config` reads the same one back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
