"""The records that flow between stages, one class for each kind of artifact."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """What neither changes nor has fields that are unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(Frozen):
    """Size and SHA-256, as hex, of one file of an artifact."""

    size_bytes: int
    sha256: str


class Record(Frozen):
    """What every artifact's manifest holds."""

    kind: ClassVar[str]

    id: str
    uri: str
    """Where the folder is: a path or an fsspec URI."""
    parents: tuple[str, ...]
    """Ids of the artifacts that this one was made from."""
    settings: dict[str, Any]
    """The part of the config that shaped it."""
    code_version: str
    code_revision: int = 0
    """Part of the id: REVISIONS in artifacts/identity.py."""
    code_digest: str = ""
    """Of the code that made it."""
    created: str
    """ISO 8601, UTC."""
    wall_s: float
    device: str
    files: dict[str, FileEntry]
    """By path relative to the folder, manifest.json left out."""

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(entry.size_bytes for entry in self.files.values())


class DatasetRecord(Record):
    """LLaVA JSON (train.json, test.json), images-*.tar, where rows lie in them (train.npz,
    test.npz), and rejected.jsonl."""

    kind: ClassVar[str] = "dataset"

    source: str
    num_train: int
    num_test: int
    num_rows: int = 0
    """Of the source that could be used; those of data.mix may be trained on more or less often."""
    num_exchanges: int = 0
    """Questions with their answers, of all rows together."""
    num_images: int = 0
    """Pictures of all rows together."""
    rejected: dict[str, int]
    """How many rows were left out, by reason."""


class AdapterCheckpoint(Record):
    """A peft adapter folder, the trained projector, metrics.jsonl and its curve.png.

    A full fine-tune leaves the language model's weights in place of the adapter folder. Names in
    the safetensors are those of LlavaForConditionalGeneration.
    """

    kind: ClassVar[str] = "adapter"
    peft_folder: ClassVar[str] = "adapter"
    projector_file: ClassVar[str] = "projector.safetensors"
    language_model_file: ClassVar[str] = "language_model.safetensors"

    base_model: str
    base_model_sha256: str
    dataset_uri: str
    steps: int
    """Optimizer steps."""
    train_loss: float
    """Mean over the last tenth of the steps, at least one, logged or not; each step's loss in
    nats per supervised token."""
    eval_loss: float | None
    """Nats per supervised token of the held-out split."""
    samples_per_s: float
    """Of all workers together."""
    num_workers: int
    peak_memory_bytes: int | None = None
    """Largest of the first worker's: allocated on its GPU, or resident without one."""
    zero_stage: int | None = None
    """DeepSpeed's, 0 without it. No weight depends on it, so it is not among the settings."""


class Trial(Frozen):
    """One row of a sweep."""

    number: int
    status: Literal["finished", "stopped early", "diverged", "failed"]
    settings: dict[str, Any]
    """The keys of train that the space names."""
    value: float | None
    """The objective; None where the trial did not get that far."""
    steps: int
    error: str | None = None


class SweepResult(Record):
    """The best train settings and every trial; report.md and its pictures lie beside it."""

    kind: ClassVar[str] = "sweep"

    objective: str
    best: dict[str, Any]
    """The keys of train that the space names, as the best trial had them."""
    best_value: float
    steps: int
    """Optimizer steps of all trials together."""
    steps_without_early_stop: int
    trials: tuple[Trial, ...]


class MergedModel(Record):
    """A plain Hugging Face LlavaForConditionalGeneration folder with processor and tokenizer."""

    kind: ClassVar[str] = "merged"

    base_model: str
    base_model_sha256: str
    max_logit_difference: float
    """Largest |adapted - merged| over the probe's logits, both in fp32."""
    mean_logit_difference: float
    rounded_max_logit_difference: float
    """The same once the merged weights are rounded to the dtype that is written."""
    pixel_differences: dict[str, float] = Field(default_factory=dict)
    """Between transformers' processor of the folder and the pixels trained on, the largest by the
    kind of picture, in steps of 1/255."""
    peak_memory_bytes: int | None = None
    """Allocated on the GPU that merged, or resident without one."""


class Variant(Record):
    """A quantized (or baseline) model folder that one of the engines opens."""

    kind: ClassVar[str] = "variant"
    status: Literal["ok"] = "ok"

    slug: str
    method: str
    bits_per_weight: float
    """Of the language model's quantized linear layers, scales and zeros counted in."""
    quantize_s: float
    peak_memory_bytes: int
    estimated_bytes: int | None = None
    """Size as it was expected from the merged model's shapes."""


class VariantFailure(Frozen):
    """Why a variant does not exist; kept apart from the scorecards."""

    status: Literal["failed"] = "failed"

    slug: str
    reason: str


def missing_line(failures: Mapping[str, str], total: int) -> str:
    """Say in one line which variants failed and why; empty where none did."""
    if not failures:
        return ""
    by_reason: dict[str, list[str]] = {}
    for slug, reason in failures.items():
        by_reason.setdefault(reason, []).append(slug)
    parts = "; ".join(f"{', '.join(slugs)}: {reason}" for reason, slugs in by_reason.items())
    return f"{len(failures)} of {total} variants failed: {parts}"


class QuantizationRun(Record):
    """How long the variants made together took, apart and in all (`wall_s`)."""

    kind: ClassVar[str] = "quantization"

    variant_wall_s: dict[str, float]
    """By slug; what each took by itself, waiting for resources left out."""
    failures: tuple[VariantFailure, ...]

    @property
    def sum_s(self) -> float:
        """What the variants take one after the other."""
        return sum(self.variant_wall_s.values())


class Spread(Frozen):
    """A repeated measurement, in the unit that its field's name ends with."""

    median: float
    low: float
    high: float
    repeats: int


class Generation(Frozen):
    """What a variant says about one image of the held-out split."""

    image: str
    reference: str
    text: str


class Scorecard(Record):
    """Every measurement of one variant, with its generations."""

    kind: ClassVar[str] = "scorecard"

    slug: str
    variant_uri: str
    dataset_uri: str
    versions: dict[str, str]
    """Of the packages that the engine runs on, by name."""
    variant_bytes: int
    memory_bytes: int
    """Peak resident (CPU) or allocated (GPU) memory of the engine's process."""
    weight_bytes: int
    """Weights that one decoded token reads."""
    copy_bytes_per_s: float
    """Memory bandwidth of the device, measured by a copy: bytes read and written."""
    load_s: float
    prefill_s: Spread
    """To the first token of one prompt with an image."""
    decode_tokens_per_s: Spread
    """Of one sequence alone, its first token left out."""
    kl_divergence: Spread
    """Mean over tokens of KL(baseline || variant) in nats; low and high are a 95% interval."""
    top1_agreement: float
    """Share of teacher-forced tokens where the variant's argmax is the baseline's."""
    perplexity: float
    """exp of the mean negative log-likelihood of the same tokens."""
    scores: dict[str, float]
    """Caption scores on the held-out split: rouge_l (0 to 1), cider_d (0 to 10), word_recall and
    character_error_rate (shares; only where the captions quote words)."""
    generations: tuple[Generation, ...]

    @property
    def device_name(self) -> str:
        """The GPU or processor of the node that measured; part of the id."""
        return str(self.settings.get("device_name", ""))

    @property
    def bandwidth_share(self) -> float:
        """The share of the device's bandwidth that reading the weights takes while decoding."""
        return self.weight_bytes * self.decode_tokens_per_s.median / self.copy_bytes_per_s


class ReferenceScores(Record):
    """The baseline's log probabilities: one safetensors file per held-out sample, its tokens and
    pixels with it."""

    kind: ClassVar[str] = "reference"

    num_samples: int
    num_tokens: int


class ChosenVariant(Record):
    """The winner and the reason against every other; report.md and report.html lie beside it."""

    kind: ClassVar[str] = "chosen"

    slug: str
    variant_uri: str
    reasons: tuple[str, ...]
    """Why the winner won."""
    against: dict[str, str]
    """By slug of every other variant, the failed ones included: why not."""

    @property
    def missing(self) -> str:
        """Which variants failed and why, in one line; empty where none did."""
        return missing_line(self.settings["failures"], len(self.against) + 1)


class DeploymentRecord(Record):
    """A running endpoint."""

    kind: ClassVar[str] = "deployment"

    slug: str
    variant_uri: str
    url: str
    """Base URL for an OpenAI client, ending in /v1."""
    app_name: str
    model_name: str
    curl: str
    """A command that asks the endpoint about a held-out image."""
