"""The records that flow between stages, and the folders behind them.

An artifact is a folder `<storage>/<kind>/<id>` whose manifest.json is its record. The id comes
from the settings that made it and its parents' ids, so the same work is found, not redone.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llava_ray import __version__
from llava_ray.errors import ArtifactError
from llava_ray.storage import Storage, cache_folder, disk_errors

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    """Size and hash of one file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    sha256: str


class Record(BaseModel):
    """What every artifact's manifest holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: ClassVar[str]

    id: str
    uri: str
    """Where the folder is: a path or an fsspec URI."""
    parents: tuple[str, ...]
    """Ids of the artifacts that this one was made from."""
    settings: dict[str, Any]
    """The part of the config that shaped it."""
    code_version: str
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
    """LLaVA JSON (train.json, test.json), images/ and rejected.jsonl."""

    kind: ClassVar[str] = "dataset"

    source: str
    num_train: int
    num_test: int
    rejected: dict[str, int]
    """How many rows were left out, by reason."""
    further_exchanges: int = 0
    """Exchanges of longer conversations that were left out; the first of each is kept."""


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
    train_loss: float
    """Mean over the last tenth of the steps, nats per supervised token."""
    eval_loss: float | None
    samples_per_s: float
    num_workers: int


class Trial(BaseModel):
    """One row of a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """Of all trials together."""
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


class VariantFailure(BaseModel):
    """Why a variant does not exist; kept apart from the scorecards."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    status: Literal["failed"] = "failed"

    slug: str
    reason: str


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


class Spread(BaseModel):
    """A repeated measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    low: float
    high: float
    repeats: int


class Generation(BaseModel):
    """What a variant says about one image of the held-out split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    decode_tokens_per_s: Spread
    kl_divergence: Spread
    """Mean over tokens of KL(baseline || variant) in nats; low and high are a 95% interval."""
    top1_agreement: float
    """Share of teacher-forced tokens where the variant's argmax is the baseline's."""
    perplexity: float
    scores: dict[str, float]
    """Caption scores on the held-out split: rouge_l, cider_d (0 to 10), word_recall,
    character_error_rate; the last two only where the captions quote words."""
    generations: tuple[Generation, ...]

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


R = TypeVar("R", bound=Record)


class Build:
    """A folder under construction; `finish` seals it."""

    def __init__(
        self,
        storage: Storage,
        record_type: type[Record],
        artifact_id: str,
        settings: Mapping[str, Any],
        parents: Sequence[str],
    ) -> None:
        self.folder = storage.staging(artifact_id)
        self._storage = storage
        self._record_type = record_type
        self._id = artifact_id
        self._settings = dict(settings)
        self._parents = tuple(parents)
        self._start = time.monotonic()

    def finish(self, record_type: type[R], *, device: str, **fields: Any) -> R:
        """Hash the files, write the manifest last and move the folder to its place."""
        assert record_type is self._record_type
        relative = f"{record_type.kind}/{self._id}"
        with disk_errors(self._storage.join(relative)):
            record = record_type(
                id=self._id,
                uri=self._storage.join(relative),
                parents=self._parents,
                settings=self._settings,
                code_version=__version__,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                wall_s=round(time.monotonic() - self._start, 3),
                device=device,
                files=_hash_files(self.folder),
                **fields,
            )
            # Written last: a manifest on disk means that the whole folder is there.
            (self.folder / MANIFEST).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        self._storage.put_folder(self.folder, relative, last=MANIFEST)
        logger.info("%s finished in %.1f s: %s", record.id, record.wall_s, record.uri)
        return record


class ArtifactStore:
    """Find and build artifacts below one storage root."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)

    def find(self, record_type: type[R], artifact_id: str) -> R | None:
        """Return the finished artifact's record, or None."""
        text = self.storage.read_text(f"{record_type.kind}/{artifact_id}/{MANIFEST}")
        return None if text is None else _parse(record_type, text, artifact_id)

    def latest(self, record_type: type[R]) -> list[R]:
        """Return all finished artifacts of a kind, newest last; for people, never for stages."""
        found = (
            self.find(record_type, name) for name in self.storage.list_folders(record_type.kind)
        )
        return sorted((r for r in found if r is not None), key=lambda r: r.created)

    @contextmanager
    def build(
        self,
        record_type: type[Record],
        artifact_id: str,
        *,
        settings: Mapping[str, Any],
        parents: Sequence[str] = (),
    ) -> Iterator[Build]:
        """Give a staging folder that vanishes unless `finish` is called."""
        build = Build(self.storage, record_type, artifact_id, settings, parents)
        try:
            with disk_errors(self.storage.uri):
                yield build
        finally:
            shutil.rmtree(build.folder, ignore_errors=True)

    def work_uri(self, artifact_id: str) -> str:
        """Return where an unfinished artifact keeps its checkpoints between runs."""
        return self.storage.join(f"work/{artifact_id}")


def artifact_id(kind: str, settings: Mapping[str, Any], parents: Sequence[str] = ()) -> str:
    """Derive an id from what shapes an artifact: `<kind>-<12 hex digits>`."""
    text = json.dumps([kind, settings, list(parents)], sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def local_folder(record: Record) -> Path:
    """Return the artifact's folder on this machine's disk, downloading and checking it if needed.

    Raises ArtifactError when the files differ from the manifest.
    """
    storage = Storage(record.uri)
    if storage.is_local:
        folder = Path(storage.root)
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(
                f"{record.id}: no finished artifact at {folder} on this machine; "
                "on several nodes storage.uri must be shared (s3://, gs:// or a network disk)"
            )
        return folder
    folder = cache_folder() / "artifacts" / record.id
    if not (folder / MANIFEST).is_file():
        staging = folder.with_name(f".{folder.name}-{time.time_ns()}")
        storage.get_folder("", staging)
        verify(record, staging)
        if not folder.exists():
            staging.rename(folder)
    return folder


def read_record(record_type: type[R], uri: str) -> R:
    """Read the record of the artifact at a URI.

    Raises ArtifactError when there is none, or when it is not of that kind.
    """
    text = Storage(uri).read_text(MANIFEST)
    if text is None:
        raise ArtifactError(f"{uri}: no manifest.json; give the folder of a finished artifact")
    return _parse(record_type, text, uri)


def verify(record: Record, folder: Path) -> None:
    """Check every file of a folder against the manifest's SHA-256.

    Raises ArtifactError that names the first file that is missing or differs.
    """
    found = _hash_files(folder)
    for name, expected in record.files.items():
        if found.get(name) != expected:
            state = "differs from" if name in found else "is missing but is in"
            raise ArtifactError(
                f"{record.id}: {name} {state} the manifest at {folder}; "
                "delete the folder and run the stage again"
            )


def _parse(record_type: type[R], text: str, where: str) -> R:
    try:
        return record_type.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"{where}: manifest.json is not a {record_type.__name__} of this version "
            f"({error.error_count()} mistakes, first: {error.errors()[0]['msg']}); "
            "delete the folder and run the stage again"
        ) from error


def _hash_files(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            size_bytes=path.stat().st_size, sha256=sha256_of(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
