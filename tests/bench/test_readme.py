"""README and the page of results say what is there: tables, files and commands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from llava_ray.artifacts.code_digest import code_digest, with_digests
from llava_ray.bench.readme import PAGES, TABLES, fill
from llava_ray.bench.train_rows import EngineName
from llava_ray.errors import ConfigError

README = Path("README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_are_made_from_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text, Path("jobs/results")) == text


def test_the_page_of_results_has_every_table_whole() -> None:
    text = PAGES[1].read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(TABLES) - {"hardware"}


def test_a_row_that_is_not_there_is_named() -> None:
    block = "<!-- table: quickstart | none-fp16 | gguf-q4 -->\n<!-- end -->"
    with pytest.raises(ConfigError, match="no row 'gguf-q4'"):
        fill(block, Path("jobs/results"))
    kept = fill(block.replace(" | gguf-q4", ""), Path("jobs/results"))
    assert [line for line in kept.splitlines() if "fp16" in line][1].startswith("| none-fp16 | ")


def test_a_table_without_its_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decode_h100\.json: cannot be read"):
        fill("<!-- table: decode -->\n<!-- end -->", tmp_path)
    with pytest.raises(ConfigError, match="'speed': there are"):
        fill("<!-- table: speed -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize(
    ("then", "told"),
    [
        (code_digest("costs"), ""),
        (
            "1a2b3c4d5e6f",
            "\n*The code has changed since this was measured (digest then: 1a2b3c4d5e6f).*\n",
        ),
        (None, "\n*The results do not say of which code they are: it may have changed since.*\n"),
    ],
)
def test_a_table_says_where_the_code_has_changed_since(
    tmp_path: Path, then: str | None, told: str
) -> None:
    parts = {"downloads_s": 3.2, "merge_s": 0.0}
    row = {"command": "true", "seconds": 1, "parts": parts, "disk_bytes": 0, "memory_bytes": 0}
    tree: dict[str, object] = {"code_digest": then, "rows": [row]}
    (tmp_path / "costs.json").write_text(json.dumps(tree))
    filled = fill("<!-- table: costs -->\n<!-- end -->", tmp_path)
    assert filled.endswith(f"| `true` | 1 s | downloads 3 | 0.0 | 0.0 |\n{told}<!-- end -->")
    assert fill(filled, tmp_path) == filled


def test_one_row_of_older_code_is_told(tmp_path: Path) -> None:
    row = {"command": "true", "seconds": 1, "disk_bytes": 0, "memory_bytes": 0}
    kept = with_digests({"code_digest": "1a2b3c4d5e6f", "rows": [row]}, "rows")
    tree = {"code_digest": code_digest("costs"), "rows": [*kept, row]}
    (tmp_path / "costs.json").write_text(json.dumps(tree))
    assert "(digest then: 1a2b3c4d5e6f)" in fill("<!-- table: costs -->\n<!-- end -->", tmp_path)


def _table(name: str, tree: object) -> str:
    return TABLES[name][1](tree)


def _train_row(engine: str, **changes: object) -> dict[str, object]:
    return {
        "engine": engine, "batch": 8, "checkpointing": False, "samples_per_s": 12.34, "gpus": 1,
        "peak_bytes": 5e9, "compile": False, "liger": False, "fused_layers": True,
        "lora_dropout": 0.0, "failed": "",
    } | changes  # fmt: skip


def test_every_trainer_has_its_own_name() -> None:
    rows = [_train_row(name) for name in get_args(EngineName)]
    rows += [_train_row("plain", compile=True), _train_row("replica", checkpointing="mlp")]
    lines = _table("train", {"rows": rows}).splitlines()[2:]
    assert len({line.split("|")[1] for line in lines[:-1]}) == len(rows) - 1
    assert "| transformers + peft + torch.compile | 8 | no | 12.3 | 5.0 |" in lines
    assert "without DeepSpeed" in lines[-1] and "| mlp |" in lines[-1]


def test_serving_shows_percentiles_where_the_file_has_them() -> None:
    old = {"first_token_p50_ms": 29.54, "per_token_p50_ms": 2.2646, "tokens_per_s": 372.1}
    new = {
        "first_token_p50_ms": 2394.4, "first_token_p99_ms": 3000.6, "per_token_p50_ms": 4.219,
        "per_token_p99_ms": 87.89, "tokens_per_s": 171.5,
    }  # fmt: skip
    load = {
        "bare": old, "served": new, "throughput_share": 0.955, "added_first_token_ms": 4.86,
        "added_per_token_ms": 0.1617,
    }  # fmt: skip
    assert _table("serving", {"ways": {"a proxy": {"8": load}}}).splitlines()[2:] == [
        "| a proxy | 8 | 29.5 / 2394 | - / 3001 | 2.26 / 4.22 | - / 87.9 | +4.9 ms | +0.16 ms | "
        "95.5% |"
    ]


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"\]\(([^)#]+)\)", README)
    named += re.findall(r"\b(?:jobs|serve|cluster|tests|llava_ray)/[\w./-]*\w", README)
    missing = [name for name in named if "://" not in name and not Path(name).exists()]
    assert not missing


def test_jobs_of_the_commands_say_how_they_are_used() -> None:
    scripts = {part for c in COMMANDS for part in shlex.split(c) if re.match(r"jobs/\w+\.py", part)}
    assert scripts
    for script in sorted(scripts):
        done = subprocess.run(
            [sys.executable, script, "--help"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "--config" in done.stdout
