"""How many weights a LLaVA has, part by part, from its config.json alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.models.family import family_from


@dataclass(frozen=True)
class Sizes:
    """Widths and counts of a LLaVA-1.5-shaped model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_width: int
    """Of all key heads together."""
    vocabulary: int
    vision_hidden: int
    vision_inner: int
    vision_layers: int
    vision_patch: int
    patches: int
    """Of one square that the vision tower sees."""
    image_tokens: int
    """The most that a picture takes."""
    tied: bool
    """Whether the head is the embedding."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "Sizes":
        """Read config.json; what it leaves out is what transformers takes.

        Raises ConfigError where that hangs on the tower.
        """
        try:
            return cls._read(tree)
        except KeyError as error:
            raise ConfigError(f"config.json names no {error} of its parts: add it") from error

    @classmethod
    def _read(cls, tree: Mapping[str, Any]) -> "Sizes":
        text, vision = tree["text_config"], tree["vision_config"]
        heads = text.get("num_attention_heads", 32)
        hidden = text.get("hidden_size", 4096)
        patch = vision["patch_size"]
        return cls(
            hidden=hidden,
            inner=text.get("intermediate_size", 11008),
            layers=text.get("num_hidden_layers", 32),
            heads=heads,
            kv_width=hidden // heads * text.get("num_key_value_heads", heads),
            vocabulary=text["vocab_size"],
            vision_hidden=vision["hidden_size"],
            vision_inner=vision["intermediate_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_patch=patch,
            patches=(vision["image_size"] // patch) ** 2,
            image_tokens=family_from(tree).max_image_tokens,
            tied=bool(tree.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of each linear layer of one LLaMA layer."""
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    def layer_linear(self) -> int:
        """Count the weights of one LLaMA layer's linear layers."""
        return sum(inputs * outputs for inputs, outputs in self.linears().values())

    def layer(self) -> int:
        """Count the weights of one LLaMA layer."""
        return self.layer_linear() + 2 * self.hidden

    def language_model(self) -> int:
        """Count layers, embedding, last norm and head."""
        return (
            self.layers * self.layer()
            + self.hidden
            + (2 - self.tied) * self.vocabulary * self.hidden
        )

    def projector(self) -> int:
        """Count the two linear layers between vision tower and language model."""
        return (self.vision_hidden + 1) * self.hidden + (self.hidden + 1) * self.hidden

    def vision_tower(self) -> int:
        """Count CLIP's image half without its final projection."""
        width, inner = self.vision_hidden, self.vision_inner
        layer = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
        embeddings = width + 3 * self.vision_patch**2 * width + (self.patches + 1) * width
        return self.vision_layers * layer + embeddings + 4 * width

    def total(self) -> int:
        """Count all weights."""
        return self.language_model() + self.projector() + self.vision_tower()

    def lora(self, r: int, targets: Sequence[str], *, in_vision_tower: bool = False) -> int:
        """Count LoRA's weights.

        Short names without the language model's prefix also match the vision tower's q_proj,
        k_proj and v_proj (its others are called out_proj, fc1 and fc2): `in_vision_tower`.
        """
        linears = self.linears()
        count = self.layers * sum(r * sum(linears[name]) for name in targets)
        if in_vision_tower:
            shared = {"q_proj", "k_proj", "v_proj"} & set(targets)
            count += self.vision_layers * len(shared) * r * 2 * self.vision_hidden
        return count
