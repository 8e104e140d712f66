import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_ray.config.overrides import known_keys
from llava_ray.config.run import RunConfig, load_config, to_yaml
from llava_ray.errors import ConfigError


def test_override_is_split_at_the_first_equals_sign() -> None:
    config = load_config(None, ["data.question=What is 1=1?", "train.learning_rate=1e-4"])
    assert config.data.question == "What is 1=1?"
    assert config.train.learning_rate == 1e-4


TEXTS = {
    f"{section}.{key}": field
    for section, part in RunConfig.model_fields.items()
    for key, field in getattr(part.annotation, "model_fields", {}).items()
    if field.annotation in (str, str | None)
}
_NAMES = {"benchmark.baseline", "serve.canary", "benchmark.device", "train.resume_from"}
"""Of variants that must be named elsewhere too, of devices and of trainings."""


@pytest.mark.parametrize("key", sorted(TEXTS.keys() - _NAMES))
@given(text=st.text(min_size=1).filter(lambda text: text != "null"))
@example("7e10432")
@example("What is this: a dog?")
@example("[OCR] Read it")
@example("yes")
@example("'quoted'")
@example(" # no comment\n")
def test_text_stays_as_typed(key: str, text: str) -> None:
    """B9"""
    section, _, name = key.partition(".")
    assert getattr(getattr(load_config(None, [f"{key}={text}"]), section), name) == text


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_null_is_none_only_where_a_key_need_not_be_set(key: str) -> None:
    """B9"""
    section, _, name = key.partition(".")
    if TEXTS[key].annotation is str:
        if key not in _NAMES - {"benchmark.device"}:
            assert getattr(getattr(load_config(None, [f"{key}=null"]), section), name) == "null"
    else:
        assert getattr(getattr(load_config(None, [f"{key}=null"]), section), name) is None


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
    assert "train.lora_r" in known_keys(RunConfig)
    assert RunConfig() == load_config(None)


def test_the_articles_run() -> None:
    config = load_config(Path("jobs/configs/llava-1.5-7b-textocr.yaml"))
    train = config.train
    assert config.model.path == "llava-hf/llava-1.5-7b-hf"
    assert (config.data.source, config.data.caption_column, config.data.image_column) == (
        "jimmycarter/textocr-gpt4v", "caption_condensed", "filename",
    )  # fmt: skip
    assert (train.num_workers, train.zero_stage, train.precision) == (4, 3, "fp16")
    assert (train.method, train.lora_r, train.lora_alpha) == ("lora", 48, 256)
    assert (train.batch_size, train.eval_batch_size, train.gradient_accumulation) == (1, 4, 4)
    assert (train.learning_rate, train.projector_learning_rate) == (2e-4, 2e-5)
    assert (train.lr_scheduler, train.warmup_ratio, train.weight_decay) == ("cosine", 0.03, 0)
    assert (train.epochs, train.max_length, train.loader_workers) == (1, 2048, 4)
    assert (train.checkpoints_kept, train.log_every_steps) == (1, 1)
    assert train.gradient_checkpointing is True
    assert train.group_by_modality_length is True


def test_documented_keys_beside_llavas_flags_exist() -> None:
    table = Path("jobs/configs/llava_flags.md").read_text()
    named = set(re.findall(r"`((?:train|model|data)\.\w+)", table))
    assert named <= set(known_keys(RunConfig))
    own = {"num_workers", "cpus_per_worker", "max_failures", "fused_layers"}
    of_hqq_and_galore = {"hqq_group_size", "galore_rank", "galore_update_steps", "galore_scale"}
    documented = {key.removeprefix("train.") for key in named if key.startswith("train.")}
    keys = {key.removeprefix("train.") for key in known_keys(RunConfig) if key.startswith("train.")}
    assert keys - documented == own | of_hqq_and_galore


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.optimizer=adamw8bit", "train.zero_stage=2"], "needs zero_stage=0"),
        (["train.optimizer=galore", "train.zero_stage=0"], "needs method=full"),
        (["train.method=hqq", "train.zero_stage=3"], "needs zero_stage=2"),
        (["train.zero_stage=0", "train.precision=fp16"], "needs zero_stage=2 or 3"),
        (["train.zero_stage=0", "train.offload=optimizer"], "needs zero_stage=2 or 3"),
    ],
)
def test_ways_of_training_that_exclude_each_other(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("serve.max_replicas=true", "needs a number, not true"),
        ("train.warmup_ratio=false", "needs a number, not false"),
        ("serve.request_timeout_s=.inf", "finite number"),
        ("serve.step_timeout_s=0.001", "greater than or equal to 1"),
        ("serve.image_hosts=[https://example.com/]", "is no host"),
        ("serve.image_hosts=[example.com:port]", "is no host"),
    ],
)
def test_numbers_and_hosts_are_ones(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, [override])


def test_a_model_and_one_beside_it_need_different_names() -> None:
    with pytest.raises(ConfigError, match="model_name 'none-fp16' is a slug in beside"):
        load_config(None, ["serve.beside=[none-fp16]", "serve.model_name=none-fp16"])


@pytest.mark.parametrize("path", sorted(Path("jobs/configs").rglob("*.yaml")), ids=str)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.name == "pretrain.yaml":
        pytest.skip("pretraining has settings of its own")
    load_config(path)
    head = path.read_text().split("\n\n")[0]
    for word in ("What:", "Needs:", "Run:", "Override:"):
        assert word in head, f"{path} lacks '# {word}'"


def test_shipped_configs_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path("jobs/configs/quickstart.yaml")
    assert load_config(shipped) != load_config(None)
    shipped.parent.mkdir(parents=True)
    shipped.write_text("serve: {port: 8123}")
    assert load_config(shipped).serve.port == 8123, "the own file goes first"


def test_a_list_of_node_types_is_given_in_an_override() -> None:
    config = load_config(None, ["resources.node_types=[{num_cpus: 4, max_count: 2}]"])
    (found,) = config.resources.node_types
    assert (found.num_cpus, found.max_count) == (4, 2)
    assert load_config(None, ["data.question=[OCR] Read it"]).data.question == "[OCR] Read it"
