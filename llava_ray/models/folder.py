"""Where a base model's folder is, and what of its config the stages need."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.artifacts.storage import cache_folder
from llava_ray.artifacts.store import sha256_of
from llava_ray.config.run import ModelConfig
from llava_ray.errors import ConfigError
from llava_ray.models.images import CLIP_MEAN, CLIP_STD, Colour

WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"


@dataclass(frozen=True)
class VisionShape:
    """What turns an image into tokens."""

    image_size: int
    tokens_per_image: int
    """Patches, and the class token of a tower that has one unless it is dropped."""
    image_token_id: int
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD


def base_error(folder: Path, problem: str) -> ConfigError:
    """Return what to say of a base model's folder."""
    return ConfigError(f"model.path {str(folder)!r}: {problem}")


def model_folder(config: ModelConfig) -> Path:
    """Return the folder of the base model, downloading a Hugging Face id.

    Raises ConfigError when there is no such model, or when it is not LLaVA-1.5-shaped.
    """
    if config.path == "embedded":
        return EMBEDDED
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        folder = _download(config)
    check_model(folder)
    return folder


def check_model(folder: Path) -> None:
    """Raise ConfigError where config, tokenizer or weights are missing or damaged.

    Of weights the headers and the files' lengths are looked at, not every byte.
    """
    vision_shape(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise base_error(folder, f"no {' or '.join(_TOKENIZERS)} there")
    if not any((folder / name).is_file() for name in _PROCESSORS):
        raise base_error(
            folder,
            f"no {_PROCESSORS[0]}, which says how pixels are "
            "normalized: copy it from the model that the vision tower is of",
        )
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise base_error(
                folder, f"{path.name} is no JSON ({error}); copy or download the model again"
            ) from error
    check_weights(folder)


def check_weights(folder: Path) -> None:
    """Raise ConfigError where safetensors are missing, damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    index = folder / WEIGHTS_INDEX
    names = {path.name for path in folder.glob("*.safetensors")}
    try:
        if index.is_file():
            names |= set(json.loads(index.read_bytes())["weight_map"].values())
        for name in sorted(names):
            with safe_open(folder / name, framework="np"):
                pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise base_error(
            folder, f"its weights cannot be read ({error}); copy or download the model again"
        ) from error
    if not names:
        raise base_error(folder, "no *.safetensors there")


def vision_shape(folder: Path) -> VisionShape:
    """Read image size, patch size and image token from a model folder's config.json.

    Raises ConfigError for a model that is not LLaVA-1.5-shaped.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise base_error(folder, "no config.json there")
    try:
        tree = json.loads(path.read_bytes())
        kind = tree.get("model_type")
        if "mm_vision_tower" in tree:
            raise base_error(
                folder,
                "it has the layout of LLaVA's own repository: its Hugging "
                "Face form is needed, such as llava-hf/llava-1.5-7b-hf",
            )
        if kind != "llava":
            raise base_error(
                folder,
                f"model_type is {kind!r}, not 'llava'; LLaVA-1.5 in "
                "its Hugging Face form is needed, such as llava-hf/llava-1.5-7b-hf",
            )
        mean, std = mean_and_std(folder)
        return VisionShape(
            image_size=int(tree["vision_config"]["image_size"]),
            tokens_per_image=image_tokens(tree),
            image_token_id=int(tree.get("image_token_id", tree.get("image_token_index", 32000))),
            mean=mean,
            std=std,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise base_error(folder, f"config.json is not that of a LLaVA ({reason})") from error


def image_tokens(tree: Mapping[str, Any]) -> int:
    """Return the tokens of one image, by a model's config.json."""
    vision = tree["vision_config"]
    has_class_token = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    # transformers' LlavaModel drops the first feature, whatever it is.
    drops = tree.get("vision_feature_select_strategy", "default") == "default"
    side = int(vision["image_size"]) // int(vision["patch_size"])
    return int(side**2 + has_class_token - drops)


def mean_and_std(folder: Path) -> tuple[Colour, Colour]:
    """Read by what pixels are normalized; CLIP's where no file says so."""
    for name in _PROCESSORS:
        if (path := folder / name).is_file():
            tree = json.loads(path.read_bytes())
            tree = tree.get("image_processor", tree)
            if "image_mean" in tree and "image_std" in tree:
                (a, b, c), (d, e, f) = tree["image_mean"], tree["image_std"]
                return (a, b, c), (d, e, f)
    return CLIP_MEAN, CLIP_STD


def max_positions(folder: Path) -> int:
    """Return the tokens that the language model can take."""
    text = json.loads((folder / "config.json").read_bytes())["text_config"]
    return int(text.get("max_position_embeddings", 2048))


def weights_sha256(folder: Path) -> str:
    """Hash all safetensors of a folder, in the order of their names.

    A file's hash is remembered in the cache folder for as long as its size and time stay: each
    stage asks, and the 14 GB of the 7B take 14 s.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {_remembered_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a model's folder that stages read, by name."""
    found = (
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".model", ".jinja")
    )
    return {path.name: _remembered_sha256(path) for path in sorted(found)}


def _remembered_sha256(path: Path) -> str:
    real = path.resolve()
    note = cache_folder() / "sha256" / hashlib.sha256(str(real).encode()).hexdigest()
    stat = real.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}"
    try:
        if (text := note.read_text(encoding="ascii").splitlines())[0] == state:
            return text[1]
    except (OSError, UnicodeDecodeError, IndexError):
        pass
    digest = sha256_of(real)
    # A cache that cannot be written costs time alone.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(f"{state}\n{digest}\n", encoding="ascii")
        draft.replace(note)
    return digest


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                allow_patterns=["*.json", "*.safetensors", "*.model"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path {config.path!r}: neither a folder nor a Hugging Face id that can be "
            f"downloaded ({reason})"
        ) from error
