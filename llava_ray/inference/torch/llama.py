"""Llama's forward pass over a static cache, with the model's own linear modules.

Rows of several sequences go through the linears together; only attention looks at each apart,
so that sequences of unequal length need neither padding nor masks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional

from llava_ray.inference.torch.cache import Segment, SlotCache, head_size

Projection = Callable[[torch.Tensor], torch.Tensor]


P = TypeVar("P")
Q = TypeVar("Q")


@dataclass(frozen=True)
class Layer(Generic[P]):
    """One decoder layer; projections that read the same input are merged.

    P is a Projection, or the weight of one.
    """

    input_norm: torch.Tensor
    qkv: P
    o: P
    post_norm: torch.Tensor
    gate_up: P
    down: P

    def mapped(self, make: Callable[[P], Q]) -> "Layer[Q]":
        """Return the layer with what `make` makes of each projection."""
        qkv, o, gate_up, down = map(make, (self.qkv, self.o, self.gate_up, self.down))
        return Layer(self.input_norm, qkv, o, self.post_norm, gate_up, down)


def linear_groups(layer: nn.Module) -> dict[str, list[nn.Module]]:
    """Return a decoder layer's linear modules by what can be merged."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    return {
        "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
        "o": [attention.o_proj],
        "gate_up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }


def merged(modules: Sequence[nn.Module]) -> Projection:
    """Return one callable for modules that read the same input, outputs side by side."""
    if len(modules) == 1:
        return modules[0]
    if all(type(module) is nn.Linear and module.bias is None for module in modules):
        return _merged_dense([module for module in modules if isinstance(module, nn.Linear)])
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def read_layers(
    language_model: Any, read: Callable[[str, Sequence[nn.Module]], P]
) -> Iterator[Layer[P]]:
    """Yield the decoder's layers with what `read` makes of a group's name and its modules."""
    for index, layer in enumerate(language_model.layers):
        yield Layer(
            input_norm=layer.input_layernorm.weight.detach(),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            **{
                name: read(f"layer {index} {name}", modules)
                for name, modules in linear_groups(layer).items()
            },
        )


def module_layers(language_model: Any) -> list[Layer[Projection]]:
    """Return the layers with the model's own modules as projections."""
    return list(read_layers(language_model, lambda name, modules: merged(modules)))


def rotary_tables(
    language_model: Any, context: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [context, head_dim] from the model's own rotary module.

    The sines' first half is negated, so that rotation is x * cos + roll(x, head_dim / 2) * sin.
    """
    positions = torch.arange(context, device=like.device)[None]
    cos, sin = language_model.rotary_emb(like, positions)
    sin = sin[0].clone()
    sin[:, : sin.shape[-1] // 2].neg_()
    return cos[0].contiguous(), sin


def windows_of(config: Any) -> list[int | None]:
    """Return of each layer how many tokens it attends to, itself included; None: to all."""
    kind, window = config.model_type, getattr(config, "sliding_window", None)
    if kind == "qwen2":
        return [window if each == "sliding_attention" else None for each in config.layer_types]
    # As transformers' code has it: Mistral's window is every layer's, and Llama heeds none.
    return [window if kind == "mistral" else None] * config.num_hidden_layers


class LlamaForward:
    """Run rows through all layers, writing their keys and values to the cache."""

    def __init__(
        self,
        language_model: Any,
        layers: Sequence[Layer[Projection]],
        lm_head: Projection,
        cache: SlotCache,
        *,
        alternating: bool = False,
    ) -> None:
        """`alternating`: gate_up gives gate's and up's outputs in turn, not one after the other."""
        self.config = language_model.config
        self.cache, self.alternating = cache, alternating
        self.windows = windows_of(self.config)
        self.norm = language_model.norm.weight
        self.lm_head = lm_head
        self.layers = layers
        like = language_model.embed_tokens.weight
        self.cos, self.sin = rotary_tables(language_model, cache.keys.shape[3], like)

    def __call__(self, hidden: torch.Tensor, parts: Sequence[Segment]) -> torch.Tensor:
        """Return the last layer's output before the final norm; `hidden` is [rows, hidden]."""
        cos, sin = self._rotary_rows(parts)
        for index, layer in enumerate(self.layers):
            x = self._rms_norm(hidden, layer.input_norm)
            hidden = hidden + layer.o(self._attend(index, layer.qkv(x), cos, sin, parts))
            x = self._rms_norm(hidden, layer.post_norm)
            gate_up = layer.gate_up(x)
            if self.alternating:
                gate, up = gate_up.view(*gate_up.shape[:-1], -1, 2).unbind(-1)
            else:
                gate, up = gate_up.chunk(2, dim=-1)
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of rows."""
        return self.lm_head(self._rms_norm(hidden, self.norm)).float()

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _rotary_rows(self, parts: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(parts) == 1:
            rows: Any = slice(parts[0].start, parts[0].start + parts[0].count)
        else:
            rows = torch.cat(
                [torch.arange(part.start, part.start + part.count) for part in parts]
            ).to(self.cos.device)
        return self.cos[rows][:, None], self.sin[rows][:, None]

    def _attend(
        self,
        index: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        parts: Sequence[Segment],
    ) -> torch.Tensor:
        heads, size = self.config.num_attention_heads, head_size(self.config)
        kv_heads = self.config.num_key_value_heads
        split = qkv.view(qkv.shape[0], -1, size)
        turned, values = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
        turned = turned * cos + turned.roll(size // 2, dims=-1) * sin
        queries, keys = turned[:, :heads], turned[:, heads:]
        outputs, row = [], 0
        for part in parts:
            rows = slice(row, row + part.count)
            row += part.count
            self.cache.write(index, part, keys[rows], values[rows])
            outputs.append(self._attend_part(index, part, queries[rows]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_part(self, index: int, part: Segment, queries: torch.Tensor) -> torch.Tensor:
        end = part.start + part.count
        keys, values = self.cache.read(index, part.slot, end)
        mask = None
        window = self.windows[index]
        if window is not None and end > window:
            # What no row sees is not read.
            first = max(0, part.start + 1 - window)
            keys, values = keys[:, :, first:], values[:, :, first:]
            mask = torch.ones(part.count, end - first, dtype=torch.bool, device=queries.device)
            mask = mask.tril_(part.start - first).triu_(part.start - first + 1 - window)
        elif part.start and part.count > 1:
            mask = torch.ones(part.count, end, dtype=torch.bool, device=queries.device)
            mask = mask.tril_(part.start)
        output = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and part.start == 0 and part.count > 1,
            enable_gqa=keys.shape[1] != queries.shape[1],
        )
        return output[0].transpose(0, 1).reshape(part.count, -1)


def _merged_dense(modules: Sequence[nn.Linear]) -> nn.Linear:
    """Stack the weights; the modules keep views, so nothing is stored twice."""
    weight = torch.cat([module.weight.detach() for module in modules])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    row = 0
    for module in modules:
        rows = module.out_features
        module.weight = nn.Parameter(weight[row : row + rows], requires_grad=False)
        row += rows
    return whole
