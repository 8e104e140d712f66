"""Cards run by other programs: which block is whose, and that the results file is whole."""

import json
from pathlib import Path

from llava_ray.bench.elsewhere import PICTURES, _commands, _own

BLOCKS = [
    ("python", "from transformers import AutoProcessor\n"),
    ("python", "from transformers import AutoProcessor\nfrom vllm import LLM\n"),
    ("python", "from llava_ray.models.rgb import open_image\n"),
    ("bash", "llama-mtmd-cli -m x"),
]


def test_each_reader_runs_its_own_block() -> None:
    pythons = {"transformers-4": Path("a"), "transformers-5": Path("b"), "vllm": Path("c")}
    found = _commands(BLOCKS, pythons, Path("tools"))
    assert [(reader, command[0]) for reader, command in found] == [
        ("transformers-4", "a"), ("transformers-5", "b"), ("vllm", "c"), ("llama.cpp", "env"),
    ]  # fmt: skip
    assert found[2][1][2] == BLOCKS[1][1]
    assert _own(BLOCKS) == BLOCKS[2][1]
    assert _commands(BLOCKS, {}, None) == []


def test_the_results_have_a_row_of_each_reader_and_variant_that_was_asked() -> None:
    rows = json.loads(Path("jobs/results/elsewhere.json").read_text())["rows"]
    asked = {(row["variant"], row["reader"]) for row in rows}
    readers = ("transformers-4", "transformers-5")
    assert asked >= {(slug, reader) for slug in ("none-fp16", "bnb-nf4") for reader in readers}
    for row in rows:
        assert row["pictures"] == len(PICTURES) and row["versions"]["transformers"]
        assert "failed" in row or 0 <= row["same_answers"] <= row["pictures"]
