"""What lies beside merged weights, so that others read the folder as it was trained.

The base's tokenizer, chat template and processor, with what trainers of llava-hf's folders had to
know besides: pictures are padded, answers end where the template says so.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_ray.inference.prompts import eos_token_id
from llava_ray.models.chat_template import base_tokenizer, for_others
from llava_ray.models.family import PROCESSORS, family_of

_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""Tokenizer, processor, chat template and generation config of the base."""
_PROBES = {
    "wide": (900, 300),
    "tall": (300, 900),
    "tiny": (9, 7),
    "square": (640, 640),
    "grey": (500, 333),
}
"""Widths and heights of pictures whose pixels are compared."""


def carry(base: Path, folder: Path) -> None:
    """Copy what belongs to the base beside its weights."""
    for pattern in _CARRIED:
        for path in base.glob(pattern):
            if path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copy(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(for_others(base_tokenizer(base)), encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", PROCESSORS[1]):
        # One template alone, or readers take another than training did.
        _edit(folder / name, lambda tree: tree.pop("chat_template", None))
    tell_how_pictures_are_read(folder)
    tell_older_readers_of_tokens(folder)
    stop_where_the_template_ends(folder)


def tell_how_pictures_are_read(folder: Path) -> None:
    """Have transformers and others pad pictures as training does."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor
    if not (folder / PROCESSORS[0]).is_file():
        # transformers 4 and the GGUF and AWQ tools read only this name.
        processor.from_pretrained(folder, backend="pil").save_pretrained(folder)
    family, config = family_of(folder), json.loads((folder / "config.json").read_bytes())
    told = family.image_processor()
    _edit(folder / PROCESSORS[0], lambda tree: tree.update(told))
    shape, vision = family.vision, config["vision_config"]
    strategy = config.get("vision_feature_select_strategy", "default")
    patches = (shape.image_size // vision["patch_size"]) ** 2
    # Without these the processor of a folder without a processor_config.json shows one token.
    counted = {
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": shape.tokens - patches + (strategy == "default"),
    }

    def tell(tree: dict[str, Any]) -> None:
        tree.get("image_processor", {}).update(told)
        tree.update(counted)

    if not (folder / PROCESSORS[1]).is_file():
        (folder / PROCESSORS[1]).write_text("{}", encoding="utf-8")
    _edit(folder / PROCESSORS[1], tell)


def tell_older_readers_of_tokens(folder: Path) -> None:
    """Write tokenizer_config.json so that transformers 4.57 reads it too.

    It ends with an AttributeError at a list of `extra_special_tokens`, and knows no
    `TokenizersBackend`; transformers 5 reads the older names as well.
    """

    def change(tree: dict[str, Any]) -> None:
        if isinstance(tree.get("extra_special_tokens"), list):
            extra = tree.pop("extra_special_tokens")
            if extra:
                tree.setdefault("additional_special_tokens", extra)
        if tree.get("tokenizer_class") == "TokenizersBackend":
            tree["tokenizer_class"] = "PreTrainedTokenizerFast"
        # That class would else give token_type_ids, which no LLaVA takes.
        tree.setdefault("model_input_names", ["input_ids", "attention_mask"])

    _edit(folder / "tokenizer_config.json", change)


def stop_where_the_template_ends(folder: Path) -> None:
    """Have others stop too where the chat template ends an answer, as with `<|im_end|>`."""
    from transformers import AutoTokenizer

    stop = eos_token_id(AutoTokenizer.from_pretrained(folder))
    path = folder / "generation_config.json"
    tree = json.loads(path.read_bytes()) if path.is_file() else {}
    # How the base liked to be asked, such as repetition_penalty, is not how this one was measured.
    tree = {key: value for key, value in tree.items() if key.endswith("_token_id")}
    named = tree.get("eos_token_id")
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if stop not in ends:
        tree["eos_token_id"] = [stop, *ends]
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def pixel_differences(folder: Path) -> dict[str, float]:
    """Compare what transformers' processor of a folder makes of pictures with what is trained on.

    Return the largest difference by the kind of picture, in steps of 1/255 before normalization.
    """
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor
    theirs, family = processor.from_pretrained(folder, backend="pil"), family_of(folder)
    draw = np.random.default_rng(0)
    found = {}
    for kind, (width, height) in _PROBES.items():
        noise = draw.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
        image = image.convert("L").convert("RGB") if kind == "grey" else image
        ours = family.inputs([family.pixels(image)])["pixel_values"].numpy()
        given = np.asarray(theirs(image, return_tensors="np")["pixel_values"])
        spread = np.array(family.vision.std).reshape(-1, 1, 1) * 255
        gap = np.abs(given.reshape(ours.shape) - ours) * spread
        found[kind] = round(float(gap.max()), 3)
    return found


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if path.is_file():
        tree = json.loads(path.read_bytes())
        change(tree)
        path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
