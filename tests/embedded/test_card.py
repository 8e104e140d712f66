"""The embedded model's card, beside README's row of the same model."""

import json
import re
from pathlib import Path

import pytest

from llava_ray.embedded.pretrain.card import LOG, write_card
from llava_ray.embedded.pretrain.scores import WEIGHTS
from llava_ray.errors import ConfigError
from llava_ray.models.folder import EMBEDDED

RESULTS = Path("jobs/results")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (LOG, WEIGHTS):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    return tmp_path


def test_the_card_is_made_from_the_results(folder: Path) -> None:
    card = write_card(folder, RESULTS / "pretrain.json", RESULTS / "embedded.json")
    assert card.read_text(encoding="utf-8") == (EMBEDDED / "README.md").read_text(encoding="utf-8")


def test_card_and_readme_show_the_same_figures() -> None:
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| base, before fine-tuning \|(.*)\|$", readme, re.MULTILINE)
    own = re.search(r"^\| held out \|(.*)\|$", card, re.MULTILINE)
    assert row and own
    _, words, characters, rouge, _ = (cell.strip() for cell in row[1].split("|"))
    assert [cell.strip() for cell in own[1].split("|")][1:] == [
        words, characters, f"{rouge} against the fine-tune's captions",
    ]  # fmt: skip
    assert "| ROUGE-L against the fine-tune's captions |" in readme


def test_scores_of_other_weights_make_no_card(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    tree = json.loads((RESULTS / "pretrain.json").read_text(encoding="utf-8"))
    other.write_text(json.dumps(tree | {"base_model_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"other\.json is of other weights"):
        write_card(folder, other, RESULTS / "embedded.json")
