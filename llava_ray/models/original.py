"""Checkpoints in the layout of LLaVA's own repository, turned into Hugging Face's form and back.

Theirs keep the vision tower elsewhere (`mm_vision_tower`), the projector among the language model's
weights, and often all of it in .bin files; a LoRA lies beside its base, with the projector in
non_lora_trainables.bin. Source: LLaVA, llava/model/builder.py and llava_arch.py; transformers,
models/llava/convert_llava_weights_to_hf.py.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.artifacts.storage import cache_folder, check_empty
from llava_ray.console import Progress
from llava_ray.models.family import PROCESSORS, base_error
from llava_ray.models.tensors import ShardWriter, file_name, module_name, tensors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_BACKBONES = {
    "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2",
}  # fmt: skip
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_PROJECTOR = {"mm_projector.0.": "linear_1.", "mm_projector.2.": "linear_2."}
_LORA, _OTHERS = "adapter_config.json", "non_lora_trainables.bin"
_TEXT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "hidden_act",
    "max_position_embeddings", "sliding_window", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "attention_bias",
)  # fmt: skip
_ROWS = 64
"""An embedding's rows are filled up to a multiple of it, as in llava-hf's folders."""

Find = Callable[[str], Path]
"""From a path or hub id to a folder on this machine."""


def is_original(folder: Path) -> bool:
    """Say whether a folder is in LLaVA's own layout."""
    path = folder / "config.json"
    try:
        return path.is_file() and "mm_vision_tower" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        return False  # Whoever reads it for good says what is wrong.


def converted(folder: Path, find: Find) -> Path:
    """Return the same model in Hugging Face's form, written to the cache folder once.

    find: gives the folders of the vision tower and of a LoRA's base. Raises ConfigError for what is
    no checkpoint of LLaVA.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    name = hashlib.sha256(f"{folder.resolve()} {state}".encode()).hexdigest()[:16]
    out = cache_folder() / "converted" / name
    if out.is_dir():
        return out
    logger.info("model.path %s is in LLaVA's own layout: it is converted once, to %s", folder, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=out.parent))
    try:
        _convert(folder, draft, find)
        draft.rename(out)
    except OSError:
        if not out.is_dir():  # Else another process was first.
            raise
    except (ValueError, LookupError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise base_error(folder, f"it is no checkpoint of LLaVA ({reason})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _convert(folder: Path, out: Path, find: Find) -> None:
    from transformers import AddedToken, AutoConfig, AutoTokenizer

    config = json.loads((folder / "config.json").read_bytes())
    base = folder
    if (folder / _LORA).is_file():
        base = find(json.loads((folder / _LORA).read_bytes())["base_model_name_or_path"])
    tower = find(config["mm_vision_tower"])
    of_tokens = folder if any(folder.glob("tokenizer*")) else base
    if not (of_tokens / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ValueError(
            f"{of_tokens} has tokenizer.model alone: pip install sentencepiece, or copy "
            "tokenizer.json there, as of the Llama or Vicuna that it is made from"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(
        of_tokens,
        # transformers knows no llava_llama, and would ask it for the tokenizer's class.
        config=AutoConfig.for_model(_backbone(config)),
    )
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False))
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(out)
    rows = -(-len(tokenizer) // _ROWS) * _ROWS
    tree = _config(config, tower, tokenizer, rows)
    _write_json(out / "config.json", tree)
    ends = {key: tree["text_config"].get(key) for key in ("bos_token_id", "eos_token_id")}
    _write_json(out / "generation_config.json", ends)
    _write_json(out / PROCESSORS[0], _pixels(tower, tree["vision_config"]["image_size"]))
    writer = ShardWriter(out)
    progress = Progress("convert", tree["text_config"]["num_hidden_layers"], "layers")
    for name, value in _weights(folder, base, tower):
        whole = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        writer.add({name: _filled(value, rows) if whole else value})
        if layer := re.match(r"language_model\.model\.layers\.(\d+)\.", name):
            progress.at(int(layer[1]) + 1)
    writer.finish()


def _backbone(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind not in _BACKBONES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(_BACKBONES)}")
    return _BACKBONES[kind]


def _config(config: Mapping[str, Any], tower: Path, tokenizer: Any, rows: int) -> dict[str, Any]:
    projector = config.get("mm_projector_type", "linear")
    feature = config.get("mm_vision_select_feature", "patch")
    if projector != "mlp2x_gelu" or feature not in _STRATEGIES:
        raise ValueError(
            f"mm_projector_type {projector!r} and mm_vision_select_feature {feature!r}: mlp2x_gelu "
            f"with {' or '.join(_STRATEGIES)} can be converted"
        )
    vision = json.loads((tower / "config.json").read_bytes())
    vision = vision.get("vision_config", vision)
    vision.setdefault("model_type", "clip_vision_model")
    text = {key: config[key] for key in _TEXT if config.get(key) is not None}
    tiles = config.get("mm_patch_merge_type", "flat").startswith("spatial")
    more: dict[str, Any] = {}
    if tiles:
        more["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    return {
        **more,
        "architectures": [f"Llava{'Next' * tiles}ForConditionalGeneration"],
        "model_type": "llava_next" if tiles else "llava",
        "text_config": {**text, "model_type": _backbone(config), "vocab_size": rows},
        "vision_config": vision,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES[feature],
        "projector_hidden_act": "gelu",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": config.get("torch_dtype", "float16"),
    }


def _pixels(tower: Path, side: int) -> dict[str, Any]:
    """Return the image processor's settings: the tower's own, or CLIP's."""
    path = tower / PROCESSORS[0]
    own = json.loads(path.read_bytes()) if path.is_file() else {}
    kept = {key: own[key] for key in ("image_mean", "image_std", "rescale_factor") if key in own}
    return {
        "image_processor_type": own.get("image_processor_type", "CLIPImageProcessor"),
        "do_resize": True, "size": {"shortest_edge": side}, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_normalize": True, "do_rescale": True,
        **kept,
    }  # fmt: skip


def _weights(folder: Path, base: Path, tower: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield all weights by their names in Hugging Face's folders, a LoRA folded in."""
    others = {}
    if base != folder:
        others = {_plain(name): value for name, value in _load(folder / _OTHERS).items()}
    lora = _lora(folder) if base != folder else {}
    seen = set()
    for found, value in _stored(base):
        name = _plain(found)
        if name in others or "rotary_emb.inv_freq" in name:
            continue
        seen.add(_hf_name(name))
        yield _hf_name(name), _folded(value, lora.get(name.removesuffix(".weight")))
    for name, value in others.items():
        seen.add(_hf_name(name))
        yield _hf_name(name), value
    if not any(name.startswith("vision_tower.") for name in seen):
        for name, value in _stored(tower):
            if name.startswith("vision_model."):
                yield f"vision_tower.{name}", value
    if not any(name.startswith("multi_modal_projector.") for name in seen):
        raise LookupError("no mm_projector among its weights")


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def _hf_name(name: str) -> str:
    inner = name.removeprefix("model.")
    for theirs, ours in _PROJECTOR.items():
        if inner.startswith(theirs):
            return f"multi_modal_projector.{ours}{inner.removeprefix(theirs)}"
    if inner.startswith("vision_tower.vision_tower."):
        return inner.removeprefix("vision_tower.")
    if inner == "image_newline":
        return inner
    return f"language_model.{name}"


def _lora(folder: Path) -> "dict[str, tuple[torch.Tensor, torch.Tensor, float]]":
    """Return A, B and the scale of each layer that has them."""
    config = json.loads((folder / _LORA).read_bytes())
    stored = dict(_stored(folder, "adapter_model"))
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name, a in stored.items():
        if name.endswith(".lora_A.weight"):
            b = stored[name.replace(".lora_A.", ".lora_B.")]
            found[_plain(name).removesuffix(".lora_A.weight")] = a, b, scale
    return found


def _folded(
    value: "torch.Tensor", lora: "tuple[torch.Tensor, torch.Tensor, float] | None"
) -> "torch.Tensor":
    if lora is None:
        return value
    a, b, scale = lora
    return (value.float() + scale * (b.float() @ a.float())).to(value.dtype)


def _filled(value: "torch.Tensor", rows: int) -> "torch.Tensor":
    """Add rows that are the mean of the others, for tokens that LLaVA's own code never looks up."""
    import torch

    mean = value.float().mean(0, keepdim=True).to(value.dtype)
    return torch.cat([value[:rows], mean.expand(max(0, rows - len(value)), -1)])


def _stored(folder: Path, stem: str = "") -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield the tensors of a folder, or of its files of a stem: safetensors, else .bin files."""
    if not stem and any(folder.glob("*.safetensors")):
        yield from tensors(folder)
        return
    paths = sorted(folder.glob(f"{stem or 'pytorch_model'}*.bin"))
    if stem and (folder / f"{stem}.safetensors").is_file():
        from safetensors.torch import load_file

        yield from load_file(folder / f"{stem}.safetensors").items()
        return
    if not paths:
        raise LookupError(f"no weights in {folder}")
    for path in paths:
        yield from _load(path).items()


def _load(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        # Not whatever a pickle may hold.
        loaded: dict[str, torch.Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
        return loaded
    except Exception as error:  # It raises whatever a stranger's file leads to.
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"{path.name} holds more or less than weights: {reason}") from error


def write_original(folder: Path, out: Path) -> None:
    """Write a model in Hugging Face's form to an empty folder in LLaVA's own layout, whole: the
    vision tower lies in `vision_tower` below it, where its config points to.

    Raises ConfigError for a folder that holds something.
    """
    check_empty(out)
    tower = out / "vision_tower"
    tower.mkdir(parents=True)
    from transformers import AutoConfig

    tree = AutoConfig.from_pretrained(folder).to_dict()
    text, vision = tree["text_config"], tree["vision_config"]
    rope = dict(text.get("rope_parameters") or {})
    text["rope_theta"] = rope.pop("rope_theta", None)
    text["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    back = {ours: theirs for theirs, ours in _STRATEGIES.items()}
    kinds = {ours: theirs for theirs, ours in _BACKBONES.items()}
    grids = tree.get("image_grid_pinpoints") if tree["model_type"] == "llava_next" else None
    config = {
        **{key: text[key] for key in _TEXT if text.get(key) is not None},
        "model_type": kinds[text.get("model_type", "llama")],
        "vocab_size": text["vocab_size"],
        "image_aspect_ratio": "anyres" if grids else "pad",
        "mm_hidden_size": vision["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad" if grids else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": back[tree.get("vision_feature_select_strategy", "default")],
        "mm_vision_select_layer": tree.get("vision_feature_layer", -2),
        "mm_vision_tower": str(tower.resolve()),
        "torch_dtype": tree.get("dtype", "float16"),
        "use_mm_proj": True,
        **({"image_grid_pinpoints": grids} if grids else {}),
    }
    _write_json(out / "config.json", config)
    _write_json(tower / "config.json", vision)
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(path, out)
        if path.name == PROCESSORS[0]:
            shutil.copy(path, tower)
    whole, eyes = ShardWriter(out), ShardWriter(tower)
    forth = {ours: theirs for theirs, ours in _PROJECTOR.items()}
    for stored, value in tensors(folder):
        name = file_name(module_name(stored))
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            eyes.add({rest: value})
        elif part == "multi_modal_projector":
            theirs = next(new for old, new in forth.items() if rest.startswith(old))
            whole.add({f"model.{theirs}{rest.partition('.')[2]}": value})
        else:
            whole.add({"model.image_newline" if name == "image_newline" else rest: value})
    whole.finish()
    eyes.finish()


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
