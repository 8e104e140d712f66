"""What a drill has found: the record of each scenario, the goals it missed, the file and table."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

from drill_clients import Requests
from drill_nodes import SETTINGS
from drill_stages import CHECKPOINT_EVERY_STEPS
from pydantic import BaseModel, ConfigDict, Field

from llava_ray import __version__
from llava_ray.artifacts.code_digest import code_digest, with_digests
from llava_ray.artifacts.records import Record
from llava_ray.artifacts.store import MANIFEST, read_record, verify
from llava_ray.errors import ArtifactError

CLEAN_S = 60.0
MEMORY_ALLOWANCE_BYTES = 256 * 2**20
"""What the head's caches and idle workers may take more than before the work."""


class Outcome(BaseModel):
    """One scenario: a stage, a fault, and what was lost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: str
    fault: str
    created: str
    skipped: str | None = Field(default=None)
    """Why it could not be made on this machine."""
    struck: tuple[str, ...] = Field(default=())
    finished: bool = Field(default=False)
    submissions: int = Field(default=0)
    """How often the job was submitted until it finished."""
    failed_with: str | None = Field(default=None)
    """The last line of a submission that failed."""
    recover_s: float | None = Field(default=None)
    """From the fault until lost work was taken up again, or all replicas were there again."""
    steps_lost: int | None = Field(default=None)
    """Optimizer steps that were done twice, as far as TensorBoard had heard of them."""
    checkpoint_steps: dict[str, int] = Field(default_factory=dict)
    """The last checkpoint before the fault, by run."""
    resumed_at_steps: tuple[int, ...] = Field(default=())
    begun_again: tuple[str, ...] = Field(default=())
    """Variants whose quantization was begun a second time."""
    failed_parts: tuple[str, ...] = Field(default=())
    """Trials and variants that failed while the job went on."""
    requests: Requests | None = Field(default=None)
    artifacts_checked: int = Field(default=0)
    artifacts_corrupt: tuple[str, ...] = Field(default=())
    staging_left: int = Field(default=0)
    """Folders of unfinished artifacts that a killed process has left."""
    actors_left: tuple[str, ...] = Field(default=())
    workers_left: tuple[str, ...] = Field(default=())
    memory_before_bytes: int = Field(default=0)
    memory_after_bytes: int = Field(default=0)
    clean_after_s: float | None = Field(default=None)
    """From the job's end until nothing of it was left; None: not within 60 s."""
    error: str | None = Field(default=None)
    """Why the drill itself could not go on."""
    missed: tuple[str, ...] = Field(default=())
    """The goals that were missed."""


def missed_goals(outcome: Outcome) -> tuple[str, ...]:
    """Hold a scenario against the goals: nothing corrupt, little lost, nothing left."""
    missed = []
    if outcome.error:
        missed.append(f"not carried out: {outcome.error}")
    elif not outcome.finished:
        missed.append(f"the job did not finish: {outcome.failed_with}")
    missed += [f"corrupt: {text}" for text in outcome.artifacts_corrupt]
    if outcome.steps_lost is not None and outcome.steps_lost > CHECKPOINT_EVERY_STEPS:
        missed.append(f"{outcome.steps_lost} steps lost, more than a checkpoint's interval")
    if outcome.stage == "train" and outcome.finished and outcome.fault != "disk":
        last = max(outcome.checkpoint_steps.values(), default=0)
        if last and max(outcome.resumed_at_steps, default=0) < last:
            missed.append(f"went on before the checkpoint of step {last}")
    missed += [f"failed for good: {text}" for text in outcome.failed_parts]
    if outcome.requests is not None and outcome.requests.lost:
        missed.append(f"{outcome.requests.lost} requests failed that had not begun")
    if outcome.fault == "disk" and outcome.failed_with and not _says_full(outcome.failed_with):
        missed.append(f"a full disk is not named in the last line: {outcome.failed_with[:100]}")
    missed += [f"left after {CLEAN_S:.0f} s: {text}" for text in outcome.actors_left]
    missed += [f"left after {CLEAN_S:.0f} s: {text}" for text in outcome.workers_left]
    grown = outcome.memory_after_bytes - outcome.memory_before_bytes
    if grown > MEMORY_ALLOWANCE_BYTES:
        missed.append(f"{grown / 2**20:.0f} MiB more than before")
    return tuple(missed)


def corrupt_artifacts(storage: Path) -> tuple[int, tuple[str, ...]]:
    """Check all artifacts against their manifests; return how many there are, and which fail."""
    kinds: dict[str, type[Record]] = {kind.kind: kind for kind in Record.__subclasses__()}
    manifests = sorted(storage.glob(f"*/*/{MANIFEST}"))
    corrupt = []
    for path in manifests:
        folder = path.parent
        try:
            verify(read_record(kinds[folder.parent.name], str(folder)), folder)
        except ArtifactError as error:
            corrupt.append(str(error))
    return len(manifests), tuple(corrupt)


def write_results(path: Path, outcomes: list[Outcome]) -> None:
    """Write outcomes, in the place of earlier ones of the same scenarios; others are kept."""
    earlier = []
    if path.is_file():
        earlier = with_digests(json.loads(path.read_text(encoding="utf-8")), "scenarios")
    new = [outcome.model_dump(mode="json", exclude_defaults=True) for outcome in outcomes]
    fresh = {(row["stage"], row["fault"]) for row in new}
    rows = [row for row in earlier if (row["stage"], row["fault"]) not in fresh] + new
    tree = {
        "command": "python tests/chaos",
        "code_version": __version__,
        "code_digest": code_digest("drill"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "cluster": "a head without CPUs and two nodes of one CPU each, processes of one machine",
        "checkpoint_every_steps": CHECKPOINT_EVERY_STEPS,
        "ray_settings": SETTINGS,
        "scenarios": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def outcome_line(outcome: Outcome) -> str:
    """Tell an outcome in a line for people, with a line more for each goal that was missed."""
    name = f"{outcome.stage}:{outcome.fault}"
    if outcome.skipped:
        return f"skip {name:<17} {outcome.skipped}"
    parts = []
    if outcome.recover_s is not None:
        parts.append(f"back after {outcome.recover_s:.1f} s")
    if outcome.steps_lost is not None:
        parts.append(f"{outcome.steps_lost} steps lost")
    if outcome.begun_again:
        parts.append(f"begun again: {', '.join(outcome.begun_again)}")
    if outcome.submissions > 1:
        parts.append(f"submitted {outcome.submissions} times")
    if (asked := outcome.requests) is not None:
        parts.append(
            f"requests {asked.whole} whole, {asked.sent_again} sent again, {asked.cut} cut, "
            f"{asked.lost} lost"
        )
    if outcome.clean_after_s is not None:
        parts.append(f"clean after {outcome.clean_after_s:.0f} s")
    lines = [f"{'BAD ' if outcome.missed else 'ok  '} {name:<17} {'; '.join(parts)}"]
    return "\n".join([*lines, *(f"       {text}" for text in outcome.missed)])


def plain(text: str) -> str:
    """Return a line without colours and without the folders that only this machine has."""
    return re.sub(r"(/[\w.-]+)+/", "", re.sub(r"\x1b\[[0-9;]*m", "", text))


def now() -> str:
    """Return the time as ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _says_full(line: str) -> bool:
    return "no space left" in line.lower()
