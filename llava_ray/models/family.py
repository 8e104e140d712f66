"""What differs between base models: how pictures become tokens, and what methods can take.

A family is one file beside this one; no other asks for a model type.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from llava_ray.errors import ConfigError
from llava_ray.models.images import CLIP_MEAN, CLIP_STD, Colour, ImagePixels, normalize

if TYPE_CHECKING:
    import torch

_PARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "text_config": {"model_type": ("llama", "mistral", "qwen2"), "hidden_act": ("silu",)},
    "vision_config": {"model_type": ("clip_vision_model", "siglip_vision_model")},
}
"""What engines and trainers run as transformers does; the first where nothing is said."""
_WHOLE = frozenset(
    {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "image_size",
        "patch_size", "head_dim", "sliding_window",
    }
)  # fmt: skip
_POSITIVE = frozenset({"rms_norm_eps", "layer_norm_eps", "rope_theta", "factor"})
_MAY_BE_NONE = ("num_key_value_heads", "head_dim", "sliding_window")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles hang on the position alone."""
_SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class VisionShape:
    """What turns a square of pixels into tokens."""

    image_size: int
    """Pixels along a side of the square."""
    tokens: int
    """Patches, and the class token of a tower that has one unless it is dropped."""
    image_token_id: int
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD


@dataclass(frozen=True)
class Family(ABC):
    """How a base model sees pictures, by its config.json."""

    vision: VisionShape

    @classmethod
    def read(cls, tree: Mapping[str, Any], vision: VisionShape) -> Self:
        """Read what else config.json says, by default nothing.

        Raises ValueError for what transformers cannot run.
        """
        return cls(vision)

    @property
    @abstractmethod
    def max_image_tokens(self) -> int:
        """The most tokens that a picture of any size takes; `vision.tokens` are the least."""

    @abstractmethod
    def image_tokens(self, height: int, width: int) -> int:
        """Return the tokens that a picture of a size takes."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> ImagePixels:
        """Return an RGB picture as the model takes it."""

    def inputs(
        self, images: Sequence[ImagePixels], device: str = "cpu"
    ) -> "dict[str, torch.Tensor]":
        """Return what the model's forward and `get_image_features` take beside the ids.

        `pixel_values` is float32 [tiles, 3, size, size]; by default there is nothing else.
        """
        size, mean, std = self.vision.image_size, self.vision.mean, self.vision.std
        none = np.zeros((0, size, size, 3), np.uint8)
        tiles = np.concatenate([none, *(image.tiles for image in images)])
        return {"pixel_values": normalize(tiles, device, mean, std)}

    def image_processor(self) -> dict[str, Any]:
        """Return the settings by which transformers' processor makes these pixels."""
        return {
            "do_resize": True,
            "size": {"shortest_edge": self.vision.image_size},
            "resample": Image.Resampling.BICUBIC.value,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(self.vision.mean),
            "image_std": list(self.vision.std),
        }

    def obstacle(self, method: str) -> str:
        """Say why a quantization method cannot take such models; empty where it can."""
        return ""


def base_error(folder: Path, problem: str) -> ConfigError:
    """Return what to say of a base model's folder."""
    return ConfigError(f"model.path {str(folder)!r}: {problem}")


def family_of(folder: Path) -> Family:
    """Read a model folder's config.json, and by what its pixels are normalized.

    Raises ConfigError for a model of no known family.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise base_error(folder, "no config.json there")
    try:
        tree = json.loads(path.read_bytes())
        if broken := [name for name in _PARTS if not isinstance(tree.get(name, {}), dict)]:
            raise base_error(folder, f"config.json's {broken[0]} is no object")
        if "mm_vision_tower" in tree:
            raise base_error(
                folder,
                "it has the layout of LLaVA's own repository: its Hugging "
                "Face form is needed, such as llava-hf/llava-1.5-7b-hf",
            )
        kind = tree.get("model_type")
        if kind not in _families():
            raise base_error(
                folder,
                f"model_type is {kind!r}, not one of {', '.join(map(repr, _families()))}; LLaVA in "
                "its Hugging Face form is needed, such as llava-hf/llava-1.5-7b-hf",
            )
        if problem := _unknown_part(tree) or _odd_number(tree):
            raise base_error(folder, problem)
        colours = mean_and_std(folder)
        family = family_from(tree, *colours)
        most = tree["text_config"].get("max_position_embeddings")
        if most is not None and most <= family.vision.tokens:
            raise base_error(
                folder,
                f"max_position_embeddings is {most}, and a picture alone takes "
                f"{family.vision.tokens} tokens",
            )
        return family
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise base_error(folder, f"config.json is not that of a LLaVA ({reason})") from error


def family_from(
    tree: Mapping[str, Any], mean: Colour = CLIP_MEAN, std: Colour = CLIP_STD
) -> Family:
    """Return the family of a config.json; raises ValueError and LookupError for a broken one."""
    vision = tree["vision_config"]
    has_class_token = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    # transformers drops the first feature, whatever it is.
    drops = tree.get("vision_feature_select_strategy", "default") == "default"
    side = int(vision["image_size"]) // int(vision["patch_size"])
    shape = VisionShape(
        image_size=int(vision["image_size"]),
        tokens=int(side**2 + has_class_token - drops),
        image_token_id=int(tree.get("image_token_id", tree.get("image_token_index", 32000))),
        mean=mean,
        std=std,
    )
    return _families()[tree["model_type"]].read(tree, shape)


def _unknown_part(tree: Mapping[str, Any]) -> str:
    """Say which backbone, tower or rotary embedding would be run otherwise than it is meant."""
    text = tree["text_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: list[tuple[str, Any, Sequence[str]]] = [("rope_type", kind, _ROPE_TYPES)]
    for part, keys in _PARTS.items():
        found += [(f"{part}.{key}", tree[part].get(key, k[0]), k) for key, k in keys.items()]
    return "; ".join(
        f"{key} is {value!r}: only {', '.join(known)} can be run"
        for key, value, known in found
        if value not in known
    )


def _odd_number(tree: Mapping[str, Any]) -> str:
    """Say which number of a config no model can have."""
    parts = {name: tree[name] for name in _PARTS}
    text = parts["text_config"]
    parts["rope_parameters"] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for part, keys in parts.items():
        for key, value in keys.items():
            if value is None and key in _MAY_BE_NONE:
                continue
            whole, kind = key in _WHOLE, int if key in _WHOLE else int | float
            if whole or key in _POSITIVE:
                good = isinstance(value, kind) and not isinstance(value, bool) and value > 0
                if not good or value == float("inf"):
                    what = "a whole number" if whole else "a number"
                    return f"{part}.{key} is {value!r}, not {what} above 0"
    window = text.get("use_sliding_window", True) and text.get("sliding_window")
    if "sliding_attention" in (text.get("layer_types") or ()) and not window:
        return "text_config.layer_types has sliding_attention, and no sliding_window is used"
    heads, shared = text.get("num_attention_heads"), text.get("num_key_value_heads")
    # Without them they are as many as the backbone has by default.
    if heads is not None and shared is not None and heads % shared:
        return (
            f"text_config.num_attention_heads is {heads}, no multiple of num_key_value_heads, "
            f"{shared}"
        )
    return ""


def _families() -> dict[str, type[Family]]:
    from llava_ray.models.llava import Llava
    from llava_ray.models.llava_next import LlavaNext

    return {"llava": Llava, "llava_next": LlavaNext}


def mean_and_std(folder: Path) -> tuple[Colour, Colour]:
    """Read by what pixels are normalized: SigLIP's numbers or CLIP's where no file says so.

    Raises ConfigError for a processor that does something else with pixels.
    """
    found = {}
    for name in PROCESSORS:
        path = folder / name
        tree = _read_processor(path) if path.is_file() else None
        # transformers 5's second file says nothing of pixels in older folders.
        if tree is not None and (name == PROCESSORS[0] or "image_processor" in tree):
            found[name] = _colours(path, tree.get("image_processor", tree))
    if len({*found.values()}) > 1:
        raise base_error(
            folder,
            f"{' and '.join(found)} disagree on how pixels are normalized: delete the wrong one",
        )
    return next(iter(found.values()), (CLIP_MEAN, CLIP_STD))


def _read_processor(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise base_error(path.parent, f"{path.name} is damaged ({error}): copy it again") from error
    if not isinstance(tree, dict):
        raise base_error(path.parent, f"{path.name} is a {type(tree).__name__}, not an object")
    return tree


def _colours(path: Path, tree: Mapping[str, Any]) -> tuple[Colour, Colour]:
    try:
        siglip = "siglip" in str(tree.get("image_processor_type", "")).lower()
        known = _SIGLIP if siglip else (CLIP_MEAN, CLIP_STD)
        mean, std = (
            tuple(float(part) for part in tree.get(key, default))
            for key, default in zip(("image_mean", "image_std"), known, strict=True)
        )
        scale, plain = tree.get("rescale_factor", 1 / 255), ("do_rescale", "do_normalize")
        good = len(mean) == len(std) == 3 and abs(scale * 255 - 1) < 1e-3
        good = good and all(0 <= part <= 1 for part in mean) and all(0 < s < 9 for s in std)
        if good and all(tree.get(key, True) for key in plain):
            return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    except (ValueError, TypeError, AttributeError) as error:
        raise base_error(path.parent, f"{path.name} is damaged ({error}): copy it again") from error
    raise base_error(
        path.parent,
        f"{path.name}: pixels must be divided by 255 and normalized by an image_mean of 0 to 1 and "
        "an image_std above 0, three each, with do_rescale and do_normalize; it has "
        f"rescale_factor {scale:g}, {list(mean)} and {list(std)}",
    )
