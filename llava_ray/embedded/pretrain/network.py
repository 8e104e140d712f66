"""The embedded model in plain PyTorch for pretraining, faster to compile than transformers'.

Parameter names are those of transformers' LlavaForConditionalGeneration, and a test holds both
to the same logits. CLIP layers after the selected one are left out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_ray.embedded.vocabulary import VOCAB_SIZE

LETTERS = 95
"""No glyph, or one of the 94 printable ASCII characters."""
LETTERS_PER_PATCH = 3
POSITIONS = 48
SIGNS = 6
COLOUR_COUNT = 11


@dataclass(frozen=True)
class Shape:
    """Sizes of both halves, as in `architecture.model_config`."""

    hidden: int = 256
    heads: int = 4
    vision_layers: int = 6
    vision_inner: int = 1024
    text_layers: int = 6
    text_inner: int = 768
    image_size: int = 224
    patch_size: int = 16

    @property
    def patches(self) -> int:
        """Image tokens."""
        return (self.image_size // self.patch_size) ** 2


class _ClipAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.hidden, shape.hidden)
        self.k_proj = nn.Linear(shape.hidden, shape.hidden)
        self.v_proj = nn.Linear(shape.hidden, shape.hidden)
        self.out_proj = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class _ClipMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden, shape.vision_inner)
        self.fc2 = nn.Linear(shape.vision_inner, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class _ClipLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.hidden)
        self.self_attn = _ClipAttention(shape)
        self.layer_norm2 = nn.LayerNorm(shape.hidden)
        self.mlp = _ClipMlp(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _ClipEmbeddings(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        side = shape.patch_size
        self.class_embedding = nn.Parameter(torch.randn(shape.hidden) * 0.06)
        self.patch_embedding = nn.Conv2d(3, shape.hidden, side, stride=side, bias=False)
        self.position_embedding = nn.Embedding(shape.patches + 1, shape.hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        # A matrix product over unfolded patches: faster than the convolution, the same values.
        side = int(self.patch_embedding.kernel_size[0])
        patches = pixels.unfold(2, side, side).unfold(3, side, side)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        embedded: Tensor = F.linear(patches, self.patch_embedding.weight.flatten(1))
        first = self.class_embedding.to(embedded.dtype).expand(len(pixels), 1, -1)
        joined = torch.cat((first, embedded), dim=1)
        return joined + self.position_embedding.weight


class _Encoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ClipLayer(shape) for _ in range(shape.vision_layers))


class VisionTower(nn.Module):
    """CLIP's tower up to the selected layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = _ClipEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(shape.hidden)
        self.encoder = _Encoder(shape)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [images, patches, hidden], the class token dropped."""
        x: Tensor = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]


class Projector(nn.Module):
    """LLaVA-1.5's two layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(shape.hidden, shape.hidden)
        self.linear_2 = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map vision features to token embeddings."""
        out: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return out


class _RmsNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return (wide * self.weight).to(x.dtype)


class _LlamaAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class _LlamaMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.text_inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.text_inner, bias=False)
        self.down_proj = nn.Linear(shape.text_inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _LlamaLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = _RmsNorm(shape.hidden)
        self.self_attn = _LlamaAttention(shape)
        self.post_attention_layernorm = _RmsNorm(shape.hidden)
        self.mlp = _LlamaMlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LanguageModel(nn.Module):
    """Llama without its head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(_LlamaLayer(shape) for _ in range(shape.text_layers))
        self.norm = _RmsNorm(shape.hidden)
        self.head_size = shape.hidden // shape.heads

    def forward(self, embedded: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Take embeddings [b, n, hidden], positions [b, n], an additive mask [b, 1, n, n]."""
        steps = torch.arange(0, self.head_size, 2, device=embedded.device) / self.head_size
        angles = positions[..., None].float() * (10000.0**-steps)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            embedded = layer(embedded, cos, sin, mask)
        out: Tensor = self.norm(embedded)
        return out


class Model(nn.Module):
    """The three parts under transformers' names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.vision_tower = VisionTower(shape)
        self.multi_modal_projector = Projector(shape)
        self.language_model = LanguageModel(shape)


class Reader(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.model = Model(self.shape)
        self.lm_head = nn.Linear(self.shape.hidden, VOCAB_SIZE, bias=False)
        _initialize(self)

    def see(self, pixels: Tensor) -> Tensor:
        """Return the vision features [b, patches, hidden] of normalized pixels [b, 3, h, w]."""
        features: Tensor = self.model.vision_tower(pixels)
        return features

    def read(
        self, features: Tensor, prefix: Tensor, tail: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """Return logits of the tail.

        prefix: token ids [p] before the image, the same for all; tail: ids [b, n] after it;
        positions: of the tail [b, n]; mask: additive, [b, 1, p + patches + n, same].
        """
        # The residual stream stays fp32 under autocast.
        image = self.model.multi_modal_projector(features).float()
        embed = self.model.language_model.embed_tokens
        count = len(prefix) + self.shape.patches
        start = embed(prefix).expand(len(features), -1, -1)
        joined = torch.cat((start, image, embed(tail)), dim=1)
        first = torch.arange(count, device=tail.device).expand(len(tail), -1)
        hidden = self.model.language_model(joined, torch.cat((first, positions), dim=1), mask)
        logits: Tensor = self.lm_head(hidden[:, count:])
        return logits


class Probe(nn.Module):
    """Says which characters a patch holds, and of which sign; only pretraining has it.

    Its loss teaches the tower where letters are and what they are, long before captions do.
    """

    OUTPUTS = (*(LETTERS,) * LETTERS_PER_PATCH, POSITIONS, SIGNS, COLOUR_COUNT, COLOUR_COUNT)

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden)
        self.inner = nn.Linear(shape.hidden, 2 * shape.hidden)
        self.out = nn.Linear(2 * shape.hidden, sum(self.OUTPUTS))

    def forward(self, features: Tensor) -> Tensor:
        """Return [b, patches, sum of OUTPUTS]."""
        out: Tensor = self.out(F.gelu(self.inner(self.norm(features))))
        return out


def attention_mask(segments: Tensor, prefix: int) -> Tensor:
    """Let each exchange see the image and itself, not the other exchanges of its picture.

    segments: [b, n], from 1, 0 for padding. Returns an additive bfloat16 mask
    [b, 1, prefix + n, prefix + n].
    """
    start = segments.new_full((len(segments), prefix), -1)
    joined = torch.cat((start, segments), dim=1)
    length = joined.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = (joined[:, :, None] == joined[:, None, :]) | (joined[:, None, :] == -1)
    allowed = (same & causal)[:, None]
    return torch.zeros_like(allowed, dtype=torch.bfloat16).masked_fill_(~allowed, -math.inf)


def tail_positions(segments: Tensor, prefix: int) -> Tensor:
    """Return rotary positions [b, n]: every exchange starts right after the image."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    starts = torch.where(begins, index, 0).cummax(dim=1).values
    return index - starts + prefix


def _initialize(reader: Reader) -> None:
    """Draw weights by fan-in, residual outputs smaller; places start as 2-D sine waves."""
    shape = reader.shape
    for name, module in reader.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(("out_proj", "o_proj", "fc2", "down_proj")):
                std /= math.sqrt(2 * shape.text_layers)
            nn.init.normal_(module.weight, std=0.5 * std if name == "lm_head" else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(reader.model.language_model.embed_tokens.weight, std=0.5)
    tower = reader.model.vision_tower.embeddings
    nn.init.normal_(tower.patch_embedding.weight, std=0.02)
    with torch.no_grad():
        tower.position_embedding.weight[0].zero_()
        tower.position_embedding.weight[1:] = 0.5 * _sine_places(shape)


def _sine_places(shape: Shape) -> Tensor:
    side = shape.image_size // shape.patch_size
    steps = torch.arange(shape.hidden // 4)
    waves = 1.0 / 200.0 ** (steps / len(steps))
    ramp = torch.arange(side)[:, None] * waves
    axis = torch.cat((ramp.sin(), ramp.cos()), dim=1)
    down = axis[:, None].expand(side, side, -1)
    across = axis[None].expand(side, side, -1)
    return torch.cat((down, across), dim=-1).flatten(0, 1)
