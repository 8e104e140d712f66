"""Where a base model's folder is, and what of its config the stages need."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llava_ray.artifacts.storage import cache_folder
from llava_ray.artifacts.store import sha256_of
from llava_ray.config.run import ModelConfig
from llava_ray.errors import ArtifactError, ConfigError, raise_all
from llava_ray.models.family import PROCESSORS, base_error, family_of
from llava_ray.models.original import converted, is_original
from llava_ray.models.tensors import WEIGHTS, WEIGHTS_INDEX, shards

_FLOATS = ("F16", "BF16", "F32", "F64")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_READ = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", *PROCESSORS, "chat_template.json",
    WEIGHTS_INDEX,
)  # fmt: skip
"""What stages, transformers or llama.cpp's tools read, where it is there."""
EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"


def model_folder(config: ModelConfig) -> Path:
    """Return the folder of the base model, downloading a Hugging Face id.

    Raises ConfigError when there is no such model, or when it is of no known family.
    """
    if config.path == "embedded":
        return EMBEDDED
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        folder = _download(config)
    if is_original(folder):
        folder = converted(folder, _find)
    check_model(folder)
    return folder


def check_model(folder: Path) -> None:
    """Raise ConfigError that lists where config, tokenizer or weights are missing or damaged.

    Of weights the headers and the files' lengths are looked at, not every byte.
    """
    raise_all(partial(look, folder) for look in (family_of, check_files, check_weights))


def check_files(folder: Path) -> None:
    """Raise ConfigError where what lies beside the weights is missing or cannot be read."""
    problems = list(_file_problems(folder))
    if problems:
        raise base_error(folder, "; ".join(problems))


def _file_problems(folder: Path) -> Iterator[str]:
    trees: dict[str, Any] = {}
    for name in _READ:
        if (folder / name).is_file():
            try:
                trees[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                yield f"{name} is no JSON ({error}); copy or download the model again"
                continue
            if not isinstance(trees[name], dict):
                yield f"{name} is a {type(trees[name]).__name__}, not an object"
                trees[name] = {}
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"no {' or '.join(_TOKENIZERS)} there"
    of_pixels = trees.get(PROCESSORS[1], {}).get("image_processor")
    if of_pixels is None and not (folder / PROCESSORS[0]).is_file():
        yield (
            f"no {PROCESSORS[0]}, which says how pixels are normalized: copy it from the model "
            "that the vision tower is of"
        )
    elif of_pixels is not None and not isinstance(of_pixels, dict):
        yield f"{PROCESSORS[1]}'s image_processor is a {type(of_pixels).__name__}, not an object"
    if (folder / "adapter_config.json").is_file():
        yield "it holds an adapter (adapter_config.json): move it away, or merge it first"
    if trees.get("config.json", {}).get("quantization_config") is not None:
        yield "it is quantized (quantization_config): give the model as it was before"
    index = trees.get(WEIGHTS_INDEX)
    if index is not None and not (folder / WEIGHTS).is_file():
        for key in ("metadata", "weight_map"):
            if not isinstance(index.get(key), dict):
                yield f"{WEIGHTS_INDEX} has no {key}: copy or download it again"


def check_weights(folder: Path) -> None:
    """Raise ConfigError where safetensors are missing, damaged, cut off or of integers."""
    from safetensors import SafetensorError, safe_open

    try:
        paths = shards(folder)
        for path in paths:
            with safe_open(path, framework="np") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.offset_keys()}
                packed = [
                    name for name, kind in kinds.items()
                    if kind not in _FLOATS and not name.endswith(".position_ids")
                ]  # fmt: skip
                if packed:
                    raise base_error(
                        folder,
                        f"{packed[0]} is of {kinds[packed[0]]}: give the model as it was before "
                        "it was quantized",
                    )
    except ArtifactError as error:
        more = ": save_pretrained writes them from .bin files" if [*folder.glob("*.bin")] else ""
        raise base_error(folder, f"no {WEIGHTS} there and no {WEIGHTS_INDEX}{more}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise base_error(
            folder, f"its weights cannot be read ({error}); copy or download the model again"
        ) from error


def max_positions(folder: Path) -> int:
    """Return the tokens that the language model can take."""
    from transformers import AutoConfig

    text = json.loads((folder / "config.json").read_bytes())["text_config"]
    if "max_position_embeddings" not in text:  # Each backbone has a default of its own.
        text = AutoConfig.from_pretrained(folder).text_config.to_dict()
    return int(text["max_position_embeddings"])


def weights_sha256(folder: Path) -> str:
    """Hash all safetensors of a folder, in the order of their names.

    A file's hash is remembered in the cache folder for as long as its size and time stay: each
    stage asks, and the 14 GB of the 7B take 14 s.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        digest.update(f"{path.name} {_remembered_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a model's folder that stages read, by name."""
    read = (".safetensors", ".json", ".model", ".jinja")
    found = (path for path in folder.iterdir() if path.suffix in read and path.is_file())
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


_PATH = re.compile(r"[/~.]|[^/]*/[^/]*/")
"""What is no hub id."""
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")


def cached_folder(config: ModelConfig) -> Path | None:
    """Return where a base model lies on this machine already; None for a hub id that is not here.

    Raises ConfigError for a path where no folder is.
    """
    folder = Path(config.path).expanduser()
    if folder.is_file() or (not folder.is_dir() and _PATH.match(config.path)):
        what = "a file, not a folder" if folder.is_file() else "no such folder"
        raise ConfigError(f"model.path {config.path!r}: {what}; a hub id has at most one '/'")
    if config.path == "embedded":
        return EMBEDDED
    if folder.is_dir():
        return converted(folder, _find) if is_original(folder) else folder
    try:
        found = _snapshot(config, local_files_only=True)
    except (OSError, ValueError):
        return None
    return found if any(found.glob("*.safetensors")) else None


def _find(name: str) -> Path:
    """Return the folder of what a checkpoint in LLaVA's own layout rests on, such as its tower."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _download(ModelConfig(path=name), "model.path rests on")


def _snapshot(config: ModelConfig, **options: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL, "*.safetensors"]
    return Path(
        snapshot_download(config.path, revision=config.revision, allow_patterns=patterns, **options)  # type: ignore[call-overload]
    )


def _download(config: ModelConfig, named: str = "model.path") -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(config)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{named} {config.path!r}: neither a folder nor a Hugging Face id that can be "
            f"downloaded ({reason})"
        ) from error
