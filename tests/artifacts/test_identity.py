"""An id changes with what shapes the artifact, one thing at a time, and with nothing else (B3)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_ray import pipeline
from llava_ray.artifacts import identity
from llava_ray.artifacts.identity import DIGESTS, artifact_id, today, versions
from llava_ray.artifacts.inventory import describe, differences, unneeded
from llava_ray.artifacts.records import AdapterCheckpoint, ChosenVariant, MergedModel, Record
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig, changed
from llava_ray.models.folder import EMBEDDED
from llava_ray.resources.capacity import Fleet, NodeType, Resources
from llava_ray.settle import settle
from llava_ray.train import shaping_settings

NODE = NodeType("node", Resources(4), 2)


def test_code_that_changed_has_another_revision_or_was_taken_over() -> None:
    """Where what comes out changes, raise the kind's number in identity.REVISIONS. Then, and where
    nothing changes: python -m llava_ray.artifacts.identity"""
    known = json.loads(DIGESTS.read_text())
    moved = {kind for kind, now in today().items() if known.get(kind) != now}
    assert not moved, test_code_that_changed_has_another_revision_or_was_taken_over.__doc__


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(EMBEDDED, tmp_path / "base"))


def adapter_id(base: Path, nodes: NodeType = NODE, **sections: dict[str, Any]) -> str:
    config = changed(RunConfig(), model={"path": str(base)}, **sections)
    config = settle(config, Fleet((nodes,), True, "auto"))
    return artifact_id(AdapterCheckpoint.kind, shaping_settings(config), ["dataset-1"])


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        text = (base / name).read_text()
        assert old in text
        (base / name).write_text(text.replace(old, new, 1))

    return change


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        edit("config.json", '"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0'),
        edit("tokenizer_config.json", "{", '{"padding_side": "left",'),
        edit("preprocessor_config.json", "{", '{"do_pad": true,'),
        edit("chat_template.jinja", "ASSISTANT", "assistant"),
        lambda base: flip_last_byte(base / "model.safetensors"),
    ],
)
def test_every_file_of_the_base_counts(base: Path, change: Callable[[Path], None]) -> None:
    """B15."""
    before = adapter_id(base)
    change(base)
    assert adapter_id(base) != before


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"learning_rate": 1e-3}},
        {"train": {"num_workers": 2}},
        {"train": {"precision": "bf16"}},
        {"model": {"system_prompt": "Read."}},
    ],
)
def test_every_shaping_setting_counts(base: Path, sections: dict[str, dict[str, Any]]) -> None:
    config = changed(RunConfig(), model={"path": str(base)})
    config = changed(config, **sections)
    config = settle(config, Fleet((NODE,), True, "auto"))
    other = artifact_id(AdapterCheckpoint.kind, shaping_settings(config), ["dataset-1"])
    assert other != adapter_id(base)


def test_what_shapes_nothing_does_not_count(base: Path) -> None:
    before = adapter_id(base)
    (base / "README.md").write_text("Another text.")
    assert adapter_id(base, train={"trackers": ()}) == before
    # More or fewer nodes of which none has a GPU: still one worker.
    assert adapter_id(base, NodeType("node", Resources(64), 9)) == before


def test_gpus_that_can_come_count_and_not_those_that_are_up(base: Path) -> None:
    gpus = NodeType("gpu", Resources(12, 1), 8)
    assert adapter_id(base, gpus) != adapter_id(base)
    assert adapter_id(base, gpus) == adapter_id(base, gpus)


def test_revision_libraries_and_parents_count(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = adapter_id(base)
    assert artifact_id("adapter", {}, ["a"]) != artifact_id("adapter", {}, ["b"])
    with monkeypatch.context() as patch:
        patch.setattr(identity, "REVISIONS", {**identity.REVISIONS, "adapter": 99})
        assert adapter_id(base) != before
    with monkeypatch.context() as patch:
        patch.setattr(identity, "version", lambda name: "0.0.1")
        assert adapter_id(base) != before
    assert adapter_id(base) == before


def test_a_missing_package_counts_as_it_is_locked() -> None:
    """A laptop that submits jobs comes to the ids of the cluster."""
    found = versions("torch", "no-such-package")
    assert found["no-such-package"] == "none" and "+" not in found["torch"]


def sealed(
    store: ArtifactStore, kind: type[Record], name: str, parents: list[str], **more: Any
) -> Any:
    settings = {"versions": {"torch": name[-1]}, "learning_rate": 1e-3}
    with store.build(kind, name, settings=settings, parents=parents) as build:
        (build.folder / "weights").write_bytes(b"0" * 1000)
        return build.finish(kind, device="cpu", **more)


MERGED = {
    "base_model": "b", "base_model_sha256": "0", "max_logit_difference": 0,
    "mean_logit_difference": 0, "rounded_max_logit_difference": 0,
}  # fmt: skip
CHOSEN = {"slug": "s", "variant_uri": "u", "reasons": (), "against": {}}


def test_a_forced_stage_is_made_anew_once_without_what_was_made_from_it(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"storage": {"uri": str(tmp_path)}, "data": {"limit": 4}}
    dataset = pipeline.run_prepare(changed(RunConfig(), **sections))
    store = ArtifactStore(str(tmp_path))
    other = sealed(store, MergedModel, "merged-1", ["adapter-1"], **MERGED)
    merged = sealed(store, MergedModel, "merged-2", [dataset.id], **MERGED)
    sealed(store, ChosenVariant, "chosen-1", [merged.id], **CHOSEN)
    (tmp_path / "dataset" / dataset.id / "touched").touch()

    sections["storage"]["force"] = ("prepare",)
    monkeypatch.setattr(pipeline, "_STARTED", dataset.created)
    assert pipeline.run_prepare(changed(RunConfig(), **sections)) == dataset
    monkeypatch.setattr(pipeline, "_STARTED", "9999")
    anew = pipeline.run_prepare(changed(RunConfig(), **sections))
    assert anew.id == dataset.id
    assert not (tmp_path / "dataset" / dataset.id / "touched").exists()
    assert {record.id for record in store.everything()} == {other.id, dataset.id}


def test_the_inventory_says_why_and_what_can_go(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    first = sealed(store, MergedModel, "merged-1", ["adapter-1"], **MERGED)
    second = sealed(store, MergedModel, "merged-2", ["adapter-2"], **MERGED)
    sealed(store, ChosenVariant, "chosen-1", [second.id], **CHOSEN)
    assert list(differences(first, second)) == [
        'versions.torch: "1" -> "2"',
        "made from: adapter-1 -> adapter-2",
    ]
    records = store.everything()
    assert "    versions.torch" in "\n".join(describe(records))
    (gone,) = unneeded(records)
    assert gone == first
    # Where nothing was chosen yet, a line is under way.
    assert not unneeded([record for record in records if record.kind != "chosen"])
    assert store.delete([gone]) == 1000
    assert store.find(MergedModel, first.id) is None and store.find(MergedModel, second.id)
    assert not (tmp_path / "merged" / first.id).exists()
