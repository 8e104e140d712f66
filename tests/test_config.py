from pathlib import Path

import pytest

from llava_ray.config import RunConfig, known_keys, load_config, to_yaml
from llava_ray.errors import ConfigError


def test_override_is_split_at_the_first_equals_sign() -> None:
    config = load_config(None, ["data.question=What is 1=1?", "train.learning_rate=1e-4"])
    assert config.data.question == "What is 1=1?"
    assert config.train.learning_rate == 1e-4


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["train.learnin_rate=1", "train.zero_stage=7", "nonsense"])
    message = str(caught.value)
    assert "did you mean 'train.learning_rate'" in message
    assert "train.zero_stage=7" in message
    assert "'nonsense' has no '='" in message


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["train.lora_r=3", "quantize.variants=[none-fp16, bnb-nf4]"])
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [("train: [", "not YAML"), ("- a", "not sections"), ("train: 3", "train=3")],
)
def test_bad_yaml_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file at .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_baseline_must_be_among_the_variants() -> None:
    with pytest.raises(ConfigError, match="benchmark.baseline 'none-fp16' is not in"):
        load_config(None, ["quantize.variants=[bnb-nf4]"])


def test_every_key_states_a_default() -> None:
    assert "train.lora_r" in known_keys()
    assert RunConfig() == load_config(None)


@pytest.mark.parametrize("path", sorted(Path("jobs/configs").rglob("*.yaml")), ids=str)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.name == "pretrain.yaml":
        pytest.skip("pretraining has settings of its own")
    load_config(path)
    head = path.read_text().split("\n\n")[0]
    for word in ("What:", "Needs:", "Run:", "Override:"):
        assert word in head, f"{path} lacks '# {word}'"
