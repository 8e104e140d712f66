"""What a config alone shows to be wrong is said before anything is started, all of it at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, write_family

from llava_ray import cli, preflight
from llava_ray.config.run import load_config
from llava_ray.errors import ConfigError
from llava_ray.models.family import family_of
from llava_ray.models.folder import EMBEDDED, file_hashes, weights_sha256


def test_mistakes_of_several_sections_come_together() -> None:
    config = load_config(
        None,
        [
            "storage.uri=zz://bucket",
            "quantize.variants=[none-fp16, gguf-q4km]",
            "sweep.space={lr: {grid: [1]}}",
            "sweep.objective=foo",
            "data.source=scenetext",
        ],
    )
    with pytest.raises(ConfigError) as caught:
        preflight.check(config)
    for part in (
        "'zz'",
        "'gguf-q4km': did you mean",
        "sweep.space.lr",
        "sweep.objective 'foo'",
        "mean 'scene-text'",
    ):
        assert part in str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda folder: cut(folder / "model.safetensors"),
    "text": lambda folder: (folder / "model.safetensors").write_bytes(b"a" * 100),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a long header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "an empty tokenizer": lambda folder: (folder / "tokenizer.json").write_text(""),
    "half a processor": lambda folder: (folder / "preprocessor_config.json").write_text("{"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text("{"),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
    "no vision": lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'),
    "a number": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "llava", "vision_config": 5}'
    ),
    "an index of nothing": lambda folder: (folder / "model.safetensors").rename(
        folder / "model.safetensors.index.json"
    ),
    "no index": lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
}


def edit(name: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, **changes}))

    return change


def rename_token(folder: Path, old: str = "<image>", new: str = "<picture>") -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def more_tokens(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][-1], "id": 1024, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def half_an_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    named = dict(sorted(tensors.items())[::2])
    save_file(named, folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in named}, folder / "more.safetensors")
    index = {"weight_map": dict.fromkeys(named, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def two_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    other = "lm_head.weight" if "lm_head.weight" not in tensors else "language_model.lm_head.weight"
    head = next(value for name, value in tensors.items() if name.endswith("lm_head.weight"))
    save_file({**tensors, other: head.clone()}, folder / "model.safetensors")


def left_over(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    more = {f"{name.removesuffix('.weight')}.lora_A.weight": tensors[name][:4].clone()}
    save_file({**tensors, **more}, folder / "model.safetensors")


def narrow(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"]["intermediate_size"] += 8
    tree["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(tree))


def no_processor(folder: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()


def part(name: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        edit("config.json", **{name: {**tree[name], **changes}})(folder)

    return change


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another image token": (edit("config.json", image_token_index=5, image_token_id=5),
                            "<image> is token 1022 of the tokenizer and 5 in config.json"),
    "no image token": (rename_token, "has no <image> token: add it"),
    "no fast tokenizer": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        "no tokenizer.json, the fast tokenizer",
    ),
    "other shapes": (narrow, "its weights are not those of config.json: no model.language_model."),
    "no processor": (no_processor, "no preprocessor_config.json, which says"),
    "LLaVA's own layout": (
        edit("config.json", model_type="llava", mm_vision_tower="openai/clip-vit-large-patch14"),
        "model.path rests on 'openai/clip-vit-large-patch14': neither a folder nor",
    ),
    "another backbone": (
        part("text_config", model_type="qwen3"),
        "text_config.model_type is 'qwen3': only llama, mistral, qwen2 can be run",
    ),
    "another activation": (part("text_config", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "angles that hang on the length": (
        part("text_config", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type is 'dynamic'",
    ),
    "another tower": (part("vision_config", model_type="dinov2"), "model_type is 'dinov2'"),
    "a shard beside the index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        "no model.safetensors there and no model.safetensors.index.json",
    ),
    "an index that leaves weights out": (half_an_index, "are not those of config.json: no "),
    "more tokens than rows": (more_tokens, "ids up to 1024, and the embedding 1024 rows"),
    "a feature layer that is not there": (
        edit("config.json", vision_feature_layer=9), "vision_feature_layer is 9: the tower has 7"
    ),
    "another strategy": (
        edit("config.json", vision_feature_select_strategy="odd"), "describes no model that runs"
    ),
    "half a width": (
        part("text_config", hidden_size=96.5), "text_config.hidden_size is 96.5, not a whole number"
    ),
    "no patches": (part("vision_config", patch_size=0), "vision_config.patch_size is 0, not"),
    "a norm of nothing": (
        part("text_config", rms_norm_eps=float("nan")), "rms_norm_eps is nan, not a number above 0"
    ),
    "fewer positions than a picture": (
        part("text_config", max_position_embeddings=40), "a picture alone takes 196 tokens"
    ),
    "a quantized base": (
        edit("config.json", quantization_config={"quant_method": "fp8"}), "it is quantized"
    ),
    "a list of generation settings": (
        lambda folder: (folder / "generation_config.json").write_text("[]"),
        "generation_config.json is a list, not an object",
    ),
    "a mark before the config": (
        lambda folder: (folder / "config.json").write_bytes(
            b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()
        ),
        "config.json is no JSON (Unexpected UTF-8 BOM",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"), "it holds an adapter"
    ),
    "pixels that are not normalized": (
        lambda folder: [
            edit(name, do_normalize=False)(folder)
            for name in ("preprocessor_config.json", "processor_config.json")
        ],
        "with do_rescale and do_normalize",
    ),
    "no end of an answer": (
        lambda folder: [
            edit("tokenizer_config.json", eos_token=None)(folder),
            (folder / "chat_template.jinja").unlink(),
            rename_token(folder, "</s>", "</end>"),
        ],
        "an answer ends with '</s>', which is no token: set eos_token",
    ),
    "a template that undoes the protection": (
        lambda folder: (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content | replace('\u2060', '') }}</s>{% endfor %}"
        ),
        "writes 1 <image> for 0 pictures",
    ),
    "processors that disagree": (
        edit("preprocessor_config.json", image_mean=[0.1, 0.1, 0.1]),
        "preprocessor_config.json and processor_config.json disagree",
    ),
    "an older processor alone": (
        lambda folder: [
            (folder / "preprocessor_config.json").unlink(),
            (folder / "processor_config.json").write_text('{"image_token": "<image>"}'),
        ],
        "no preprocessor_config.json, which says",
    ),
    "generation settings that are refused": (
        edit("generation_config.json", num_return_sequences=5, do_sample=False),
        "generation_config.json is refused",
    ),
    "an index without metadata": (
        lambda folder: [
            (folder / "model.safetensors").rename(folder / "other.safetensors"),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        ],
        "model.safetensors.index.json has no metadata",
    ),
    "no window": (part("text_config", sliding_window=0), "sliding_window is 0, not a whole number"),
    "heads that are not shared evenly": (
        part("text_config", num_key_value_heads=64), "no multiple of num_key_value_heads, 64"
    ),
    "an unknown activation of the projector": (
        edit("config.json", projector_hidden_act="foo"), "projector_hidden_act is 'foo'"
    ),
    "a part of nothing": (edit("config.json", text_config=None), "text_config is no object"),
    "a template of nothing": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ bos_token }}"),
        "chat template shows no question",
    ),
    "named templates without a default": (
        lambda folder: [
            (folder / "chat_template.jinja").unlink(),
            edit("tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])(folder),
        ],
        "chat templates are rag: call the one to be used 'default'",
    ),
    "one tensor under two names": (two_names, "lm_head.weight is there under two names"),
    "an adapter that was not merged": (left_over, "lora_A.weight has no place in config.json's"),
    "more layers than are described": (
        part("text_config", num_hidden_layers=2), "layers.2.input_layernorm.weight has no place"
    ),
    "grids of no pairs": (
        edit("config.json", model_type="llava_next", image_grid_pinpoints=[224, 448]),
        "image_grid_pinpoints is [224, 448], not a list of heights and widths in pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_later_stage_would_trip_over_is_said_at_once(tmp_path: Path, wrong: str) -> None:
    """D5, D7, D9"""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    change, said = WRONG[wrong]
    change(folder)
    with pytest.raises(ConfigError) as caught:
        preflight.check(load_config(None, [f"model.path={folder}"]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass(tmp_path: Path, name: str) -> None:
    write_family(name, tmp_path / "model")
    preflight.check(load_config(None, [f"model.path={tmp_path / 'model'}"]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    config = load_config(None, [f"model.path={folder}"])
    preflight.check(config)
    DAMAGES[damage](folder)
    with pytest.raises(ConfigError, match="^model.path ") as caught:
        preflight.check(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/llava_ray"])
def test_storage_and_cache_that_cannot_be_written_are_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / place

    def refused(*overrides: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.run_job("test", lambda config: None, overrides)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert refused(f"storage.uri={folder}").startswith(f"error: storage.uri '{folder}': ")
    monkeypatch.setenv("LLAVA_RAY_CACHE", str(folder))
    assert refused(f"storage.uri={tmp_path}/runs").startswith("error: LLAVA_RAY_CACHE: no files")


def test_an_empty_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="storage.uri='': give text that is not empty"):
        load_config(None, ["storage.uri="])
    with pytest.raises(ConfigError, match="quantize.variants='gguf-q4_k_m': give a list"):
        load_config(None, ["quantize.variants=gguf-q4_k_m"])
    with pytest.raises(ConfigError, match="min_replicas=5 is above max_replicas=2"):
        load_config(None, ["serve.min_replicas=5", "serve.max_replicas=2"])


def test_slugs_that_a_base_cannot_have_are_said_before_anything_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """D6, D10"""
    write_family("mistral-window", tmp_path / "model")
    settings = [
        f"model.path={tmp_path / 'model'}",
        "quantize.variants=[none-fp16, gguf-q8_0, hqq-w4-g256, awq-w4-g128, bnb-nf4]",
    ]
    preflight.check(load_config(None, settings))
    for said in (
        "gguf-q8_0 cannot be made of model.path: the model attends to a window of 24 tokens",
        "hqq-w4-g256 cannot be made of model.path: variant 'hqq-w4-g256': model.language_model",
        "awq-w4-g128 cannot be made of model.path: variant 'awq-w4-g128'",
    ):
        assert said in caplog.text
    assert "bnb-nf4" not in caplog.text
    strict = load_config(None, [*settings, "quantize.on_unsupported=error"])
    with pytest.raises(ConfigError, match="gguf-q8_0 cannot be made of model.path"):
        preflight.check(strict)


def test_heads_that_are_not_named_are_the_backbones(tmp_path: Path) -> None:
    write_family("mistral", tmp_path / "model")
    part("text_config", num_key_value_heads=8)(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    tree = json.loads(path.read_text())
    del tree["text_config"]["num_attention_heads"]
    path.write_text(json.dumps(tree))
    family_of(tmp_path / "model")


def test_mistakes_of_the_model_and_of_settings_come_together(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    no_processor(folder)
    settings = [f"model.path={folder}", "train.lora_targets=[foo]", "train.max_length=3"]
    with pytest.raises(ConfigError) as caught:
        preflight.check(load_config(None, settings))
    for said in ("no preprocessor_config.json", "train.max_length=3"):
        assert said in str(caught.value)


def test_what_strikes_leave_must_open_too(tmp_path: Path) -> None:
    write_family("mistral-window", tmp_path / "model")
    settings = [
        f"model.path={tmp_path / 'model'}", "quantize.variants=[none-fp16, gguf-q8_0, bnb-nf4]",
        "choose.must_open_in=[llama.cpp]",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"choose.must_open_in: no variant .*bnb-nf4: llama.cpp"):
        preflight.check(load_config(None, settings))
    struck = [settings[0], "quantize.variants=[none-fp16, gguf-q8_0]"]
    with pytest.raises(ConfigError, match="none but the baseline can be made of model.path"):
        preflight.check(load_config(None, struck))


def test_a_vocabulary_that_lacks_letters_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["byte_fallback"] = False
    path.write_text(json.dumps(tree))
    preflight.check(load_config(None, [f"model.path={folder}", "quantize.variants=[none-fp16]"]))


def test_what_nobody_reads_is_not_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "notes.json").write_text("{")
    (folder / "old.safetensors").mkdir()
    (folder / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    edit("config.json", quantization_config=None)(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.vision_tower.embeddings.position_ids"
    save_file({**tensors, name: torch.arange(9)[None]}, folder / "model.safetensors")
    preflight.check(load_config(None, [f"model.path={folder}"]))
    assert "old.safetensors" not in file_hashes(folder) and weights_sha256(folder)


@pytest.mark.parametrize("name", ["a/file", "gone", "./gone"])
def test_a_path_where_no_folder_is_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("")
    path = name if name.startswith("./") else tmp_path / name
    with pytest.raises(ConfigError, match="a file, not a folder|no such folder"):
        preflight.check(load_config(None, [f"model.path={path}"]))


def test_a_picture_must_fit_max_length() -> None:
    config = load_config(None, ["train.max_length=100"])
    with pytest.raises(ConfigError, match="train.max_length=100: a picture alone takes 196"):
        preflight.check_training(config, EMBEDDED)
