"""Where a base model's folder is, and what of its config the stages need."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from llava_ray.artifacts.storage import cache_folder
from llava_ray.artifacts.store import sha256_of
from llava_ray.config.run import ModelConfig
from llava_ray.errors import ConfigError

EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"


@dataclass(frozen=True)
class VisionShape:
    """What turns an image into tokens."""

    image_size: int
    patch_size: int
    image_token_id: int

    @property
    def tokens_per_image(self) -> int:
        """Patches of one image; the class token is dropped (feature selection `default`)."""
        return (self.image_size // self.patch_size) ** 2


def model_folder(config: ModelConfig) -> Path:
    """Return the folder of the base model, downloading a Hugging Face id.

    Raises ConfigError when there is no such model, or when it is not LLaVA-1.5-shaped.
    """
    if config.path == "embedded":
        return EMBEDDED
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        folder = _download(config)
    vision_shape(folder)
    return folder


def vision_shape(folder: Path) -> VisionShape:
    """Read image size, patch size and image token from a model folder's config.json.

    Raises ConfigError for a model that is not LLaVA-1.5-shaped.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path {str(folder)!r}: no config.json there")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if tree.get("model_type") != "llava":
        raise ConfigError(
            f"model.path {str(folder)!r}: model_type is {tree.get('model_type')!r}, not 'llava'; "
            "LLaVA-1.5 in its Hugging Face form is needed, such as llava-hf/llava-1.5-7b-hf"
        )
    vision = tree["vision_config"]
    return VisionShape(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        image_token_id=tree.get("image_token_id", tree.get("image_token_index", 32000)),
    )


def weights_sha256(folder: Path) -> str:
    """Hash all safetensors of a folder, in the order of their names.

    A file's hash is remembered in the cache folder for as long as its size and time stay: each
    stage asks, and the 14 GB of the 7B take 14 s.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {_remembered_sha256(path)}\n".encode())
    return digest.hexdigest()


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
