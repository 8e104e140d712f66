"""The embedded model beside the probe of its pretraining, their first weights and their losses."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_ray.embedded.pretrain.examples import PROBE_CLASSES, Encoder
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.folder import EMBEDDED

PROBE_SCALES = (1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5)
"""Of the letters' losses, and of those of position, sign and the two colours."""


class Reader(nn.Module):
    """LLaVA that answers several exchanges about a picture in one pass, and the probe.

    The probe says which characters a patch shows, and of which sign. Its loss teaches the vision
    tower where letters are and what they are, long before captions do. Only pretraining has it.
    """

    def __init__(self, config: LlavaConfig, prefix: Sequence[int]) -> None:
        """Draw the first weights; `prefix` holds the token ids before the image."""
        super().__init__()
        self.llava: Any = LlavaForConditionalGeneration(config)
        vision: Any = config.vision_config
        width = vision.hidden_size
        self.probe = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, sum(PROBE_CLASSES)),
        )
        self.prefix = nn.Buffer(torch.tensor(prefix), persistent=False)
        _initialize(self)

    def forward(
        self, pixels: Tensor, ids: Tensor, positions: Tensor, segments: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the tokens after the image, and the probe's of every patch.

        pixels: normalized [b, 3, h, w]; ids, positions and segments: [b, n], as `Encoder.pack`
        lays them out. Logits are [b, n, vocabulary] and [b, patches, sum of PROBE_CLASSES].
        """
        model, layer = self.llava.model, self.llava.config.vision_feature_layer
        layers = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = layers[layer][:, 1:]
        # The residual stream stays fp32 under autocast.
        image = model.multi_modal_projector(features).float()
        embed = model.language_model.embed_tokens
        start = embed(self.prefix).expand(len(pixels), -1, -1)
        before = start.shape[1] + image.shape[1]
        first = torch.arange(before, device=ids.device).expand(len(ids), -1)
        hidden = model.language_model(
            inputs_embeds=torch.cat((start, image, embed(ids)), dim=1),
            position_ids=torch.cat((first, before + positions), dim=1),
            attention_mask=attention_mask(segments, before),
            use_cache=False,
        ).last_hidden_state
        return self.llava.lm_head(hidden[:, before:]), self.probe(features)


def shipped_reader() -> Reader:
    """Return the model of the shipped shape and tokens with new random weights."""
    return Reader(LlavaConfig.from_pretrained(EMBEDDED), Encoder().prefix())


def attention_mask(segments: Tensor, before: int) -> Tensor:
    """Let each exchange see the image and itself, not the other exchanges of its picture.

    segments: [b, n], from 1, 0 for padding. Returns a bool mask [b, 1, before + n, before + n].
    """
    joined = F.pad(segments, (before, 0))
    keys = joined[:, None, :]
    return ((keys == joined[:, :, None]) | (keys == 0)).tril()[:, None]


def _initialize(reader: Reader) -> None:
    """Draw weights by fan-in, residual outputs smaller; places start as 2-D sine waves."""
    config = reader.llava.config
    for name, module in reader.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(("out_proj", "o_proj", "fc2", "down_proj")):
                std /= math.sqrt(2 * config.text_config.num_hidden_layers)
            nn.init.normal_(module.weight, std=0.5 * std if name.endswith("lm_head") else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(reader.llava.get_input_embeddings().weight, std=0.5)
    tower = reader.llava.model.vision_tower
    nn.init.normal_(tower.embeddings.class_embedding, std=0.06)
    nn.init.normal_(tower.embeddings.patch_embedding.weight, std=0.02)
    places = tower.embeddings.position_embedding.weight.data
    places[0] = 0
    places[1:] = 0.5 * _sine_places(math.isqrt(len(places)), places.shape[1])
    # Layers after the selected one are never used, hence never trained.
    for layer in tower.encoder.layers[config.vision_feature_layer + 1 :]:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.mlp.fc2.weight)


def _sine_places(side: int, width: int) -> Tensor:
    steps = torch.arange(width // 4)
    waves = 1.0 / 200.0 ** (steps / len(steps))
    ramp = torch.arange(side)[:, None] * waves
    axis = torch.cat((ramp.sin(), ramp.cos()), dim=1)
    down, across = axis[:, None].expand(side, side, -1), axis.expand(side, side, -1)
    return torch.cat((down, across), dim=-1).flatten(0, 1)


def caption_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross entropy of each token given those before it."""
    wanted = weights[:, 1:].float()
    each = F.cross_entropy(logits[:, :-1].mT.float(), ids[:, 1:], reduction="none")
    return (each * wanted).sum() / wanted.sum().clamp(min=1)


def probe_loss(guesses: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the probe's mean losses; empty patches together weigh a fifth.

    guesses: [b, patches, sum of PROBE_CLASSES]; targets: as `augment.patch_targets` returns.
    """
    filled = (targets[..., 0] > 0).float()
    empty = 1 - filled
    balance = filled / filled.sum().clamp(min=1) + 0.2 * empty / empty.sum().clamp(min=1)
    total = torch.zeros((), device=guesses.device)
    parts = torch.split(guesses.float(), list(PROBE_CLASSES), dim=-1)
    for scale, part, wanted in zip(PROBE_SCALES, parts, targets.unbind(-1), strict=True):
        each = F.cross_entropy(part.mT, wanted, ignore_index=IGNORE_INDEX, reduction="none")
        total = total + scale * (each * balance).sum()
    return total
