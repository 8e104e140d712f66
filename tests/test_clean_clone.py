"""Commands are measured in a clean clone with an empty home."""

import json
import subprocess
from pathlib import Path

import pytest

from llava_ray.artifacts.code_digest import code_digest
from llava_ray.bench.measure import measure
from llava_ray.errors import ResourceError


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "kept.txt").write_text("kept")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "uncommitted.txt").write_text("left out")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLAVA_RAY_SECRET", "1")
    return folder


def test_commands_share_a_clean_clone_and_an_empty_home(repository: Path, tmp_path: Path) -> None:
    first = (
        'test -f kept.txt && test ! -e uncommitted.txt && test -z "$LLAVA_RAY_SECRET" '
        '&& test -z "$(ls -A ~)" && head -c 3000000 /dev/urandom > ~/left'
    )
    out = measure(tmp_path / "out" / "costs.json", [first, "test -s ~/left && sleep 1.2"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["command"] for row in rows] == [first, "test -s ~/left && sleep 1.2"]
    assert rows[1]["disk_bytes"] >= rows[0]["disk_bytes"] > 3_000_000
    assert rows[1]["seconds"] == 1


def test_a_failing_command_keeps_the_rows_before_it(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    with pytest.raises(ResourceError, match="'exit 3' ended with exit code 3"):
        measure(out, ["true", "exit 3"])
    assert [row["command"] for row in json.loads(out.read_text())["rows"]] == ["true"]
    measured = json.loads(out.read_text())
    assert measured.pop("code_digest") == code_digest("costs")
    out.write_text(json.dumps(measured))
    measure(out, [":"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["command"] for row in rows] == ["true", ":"]
    assert rows[0]["code_digest"] is None and "code_digest" not in rows[1]
