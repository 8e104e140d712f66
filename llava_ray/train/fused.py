"""LLaMA's decoder layers over frozen weights with LoRA, with a hand-written backward pass.

Equal to transformers + peft but for rounding, and faster: a LoRA product adds into its layer's
output in place, linear layers that read one input share their A products and one dropout mask,
and what is cheap is computed again instead of kept.
Needs weights that are whole on the device while a layer runs, which 4-bit bases do not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from llava_ray.config.train import LINEAR_LAYERS
from llava_ray.train.pointwise import Kernels, dropout_mask, kernels_for

Tensor = torch.Tensor

Recompute = Literal["none", "mlp", "layer"]
"""What backward computes again: nothing large, the feed-forward half, or nearly all of a layer."""


def obstacle(llava: Any) -> str | None:
    """Say why a model's layers cannot be run by this module, or return None."""
    for layer in llava.model.language_model.layers:
        if type(layer).__name__ != "LlamaDecoderLayer":
            return f"layers are {type(layer).__name__}"
        for name in LINEAR_LAYERS:
            module = _linear(layer, name)
            base = getattr(module, "base_layer", module)
            if type(base) is not nn.Linear or base.bias is not None:
                return f"{name} is not a plain linear layer without bias"
            if base.weight.requires_grad:
                return f"{name} is trained"
            if any(getattr(module, "lora_variant", {}).values()):
                return f"{name} has a variant of LoRA"
        if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return f"the activation is {type(layer.mlp.act_fn).__name__}"
        if layer.self_attn.attention_dropout:
            return "attention has dropout"
    return None


def _linear(layer: Any, name: str) -> Any:
    return getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer [out, in] and its LoRA matrices, A [r, in] and B [out, r]."""

    weight: Tensor
    a: nn.Parameter | None
    b: nn.Parameter | None
    scale: float
    dropout: float

    @classmethod
    def of(cls, module: Any) -> "Projection":
        """Take the parameters of peft's layer, or of a linear layer without LoRA."""
        if not hasattr(module, "lora_A"):
            return cls(module.weight, None, None, 0.0, 0.0)
        a, b = (matrices["default"].weight for matrices in (module.lora_A, module.lora_B))
        rate = float(getattr(module.lora_dropout["default"], "p", 0.0))
        return cls(module.base_layer.weight, a, b, module.scaling["default"], rate)


@dataclass(frozen=True)
class Hidden:
    """What a group kept of its forward pass: A's products [rows, all r], the dropout's seed."""

    values: Tensor | None
    seed: int | None


class Group:
    """Linear layers that read the same input."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.projections = [Projection.of(module) for module in modules]
        self.with_lora = [p for p in self.projections if p.a is not None]
        self.dropout = max((p.dropout for p in self.projections), default=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Return A and B of each layer that has them, in the order of the gradients."""
        return [m for p in self.with_lora for m in (p.a, p.b) if m is not None]

    def _a(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([p.a.detach().to(dtype) for p in self.with_lora if p.a is not None])

    def _slices(self, hidden: Tensor) -> list[Tensor | None]:
        widths = [p.a.shape[0] for p in self.with_lora if p.a is not None]
        parts = iter(torch.split(hidden, widths, dim=1))
        return [None if p.a is None else next(parts) for p in self.projections]

    def _dropped(self, x: Tensor, seed: int | None) -> Tensor:
        return x if seed is None else x * dropout_mask(x, self.dropout, seed)

    def forward(
        self, x: Tensor, seed: int | None, residual: Tensor | None = None
    ) -> tuple[list[Tensor], Hidden]:
        """Return each layer's output for x [rows, in], with the residual added."""
        outputs = [
            x @ p.weight.t() if residual is None else torch.addmm(residual, x, p.weight.t())
            for p in self.projections
        ]
        if not self.with_lora:
            return outputs, Hidden(None, None)
        seed = seed if self.dropout else None
        values = self._dropped(x, seed) @ self._a(x.dtype).t()
        for p, output, part in zip(self.projections, outputs, self._slices(values), strict=True):
            if p.b is not None and part is not None:
                output.addmm_(part, p.b.detach().to(x.dtype).t(), alpha=p.scale)
        return outputs, Hidden(values, seed)

    def input_gradient(
        self, gradients: Sequence[Tensor], seed: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the input [rows, in] and of A's products [rows, all r]."""
        (first, *rest), (projection, *others) = gradients, self.projections
        dx = first @ projection.weight
        for p, gradient in zip(others, rest, strict=True):
            dx.addmm_(gradient, p.weight)
        if not self.with_lora:
            return dx, None
        a = self._a(dx.dtype)
        dh = dx.new_empty(dx.shape[0], a.shape[0])
        for p, gradient, part in zip(self.projections, gradients, self._slices(dh), strict=True):
            if p.b is not None and part is not None:
                b = p.b.detach().to(dx.dtype)
                torch.addmm(part, gradient, b, beta=0, alpha=p.scale, out=part)
        if seed is None:
            dx.addmm_(dh, a)
        else:
            dx.addcmul_(dh @ a, dropout_mask(dx, self.dropout, seed))
        return dx, dh

    def weight_gradients(
        self, gradients: Sequence[Tensor], dh: Tensor | None, x: Tensor, hidden: Hidden
    ) -> list[Tensor]:
        """Return the gradients of `parameters()`."""
        if dh is None or hidden.values is None:
            return []
        da = self._slices((dh.t() @ self._dropped(x, hidden.seed)).t())
        found: list[Tensor] = []
        for p, gradient, part, of_a in zip(
            self.projections, gradients, self._slices(hidden.values), da, strict=True
        ):
            if p.a is None or p.b is None or part is None or of_a is None:
                continue
            b = p.b.detach().to(x.dtype)
            of_b = torch.addmm(b, gradient.t(), part, beta=0, alpha=p.scale)
            found += [of_a.t().to(p.a.dtype), of_b.to(p.b.dtype)]
        return found


@dataclass
class Attention:
    """Queries, keys and values [batch, heads, length, width], and attention over them."""

    inputs: tuple[Tensor, Tensor, Tensor]
    output: Tensor
    """Attention's result, with the graph by which PyTorch's own backward runs."""
    hidden: Hidden

    def rows(self) -> Tensor:
        """Return the output as [rows, heads * width]."""
        return self.output.detach().transpose(1, 2).flatten(0, 1).flatten(1)


@dataclass
class FeedForward:
    """The two halves of the gated unit [rows, intermediate]."""

    gate: Tensor
    up: Tensor
    hidden: Hidden


class Layer(nn.Module):
    """One decoder layer; a seed per group says which inputs of LoRA are dropped."""

    def __init__(self, module: Any, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        # ZeRO-3 gathers what a module holds before it runs; a list is faster to walk than modules.
        self.weights = nn.ParameterList(module.parameters())
        attention, mlp = module.self_attn, module.mlp
        self.head_width: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.norms = (module.input_layernorm, module.post_attention_layernorm)
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Group([attention.o_proj])
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj])
        self.down = Group([mlp.down_proj])
        groups = (self.qkv, self.o, self.gate_up, self.down)
        self.trained = [p for group in groups for p in group.parameters()]
        self.dropout = max(group.dropout for group in groups)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seed: int | None) -> Tensor:
        """Return the hidden states after the layer, from those before [batch, length, width]."""
        out: Tensor = _Run.apply(x, self, rope, seed, *self.trained)  # type: ignore[no-untyped-call]
        return out

    def normed(self, x: Tensor, index: int, kernels: Kernels) -> Tensor:
        """Return the first or second norm of [rows, width]."""
        norm = self.norms[index]
        out: Tensor = kernels.rms_norm(x, norm.weight.detach(), norm.variance_epsilon)
        return out

    def norm_gradient(
        self, gradient: Tensor, x: Tensor, index: int, beside: Tensor, kernels: Kernels
    ) -> Tensor:
        """Return the gradient of a norm's input, the residual path's gradient added."""
        norm = self.norms[index]
        eps: float = norm.variance_epsilon
        return kernels.rms_norm_backward(gradient, x, norm.weight.detach(), eps, beside)

    def attend(
        self, normed: Tensor, batch: int, rope: tuple[Tensor, Tensor], seed: int | None
    ) -> Attention:
        """Run q, k, v and causal attention; padding stands at the right, so none sees it."""
        kernels = kernels_for(normed.device.type)
        (q, k, v), hidden = self.qkv.forward(normed, seed)
        q, k, v = (t.view(t.shape[0], -1, self.head_width) for t in (q, k, v))
        q, k = kernels.rotate(q, *rope), kernels.rotate(k, *rope)
        q, k, v = (
            t.view(batch, -1, *t.shape[1:]).transpose(1, 2).detach().requires_grad_()
            for t in (q, k, v)
        )
        with torch.enable_grad():
            output = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        return Attention((q, k, v), output, hidden)

    def attention_gradient(
        self, attention: Attention, gradient: Tensor, rope: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        """Return the gradients of the outputs of q, k and v."""
        kernels = kernels_for(gradient.device.type)
        batch, heads, length, width = attention.output.shape
        shaped = gradient.view(batch, length, heads, width).transpose(1, 2)
        found = torch.autograd.grad(attention.output, attention.inputs, shaped)
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in found)
        cos, sin = rope
        turned = (kernels.rotate(q, cos, -sin), kernels.rotate(k, cos, -sin), v)
        return [t.flatten(1) for t in turned]

    def feed(self, normed: Tensor, seed: int | None) -> FeedForward:
        """Run gate and up."""
        (gate, up), hidden = self.gate_up.forward(normed, seed)
        return FeedForward(gate, up, hidden)


class _Run(torch.autograd.Function):
    """A decoder layer on [batch, length, width]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Layer, rope: tuple[Tensor, Tensor], seed: int | None,
        *_: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        kernels = kernels_for(x.device.type)
        seeds = [None] * 4 if seed is None else [seed + i for i in range(4)]
        rows = x.reshape(-1, x.shape[-1])
        attention = layer.attend(layer.normed(rows, 0, kernels), x.shape[0], rope, seeds[0])
        (middle,), of_o = layer.o.forward(attention.rows(), seeds[1], rows)
        fed = layer.feed(layer.normed(middle, 1, kernels), seeds[2])
        product = kernels.swiglu(fed.gate, fed.up)
        (out,), of_down = layer.down.forward(product, seeds[3], middle)
        ctx.save_for_backward(x, middle)
        ctx.layer, ctx.rope, ctx.seeds = layer, rope, seeds
        ctx.of_o, ctx.of_down = of_o, of_down
        ctx.attention = attention if layer.recompute != "layer" else None
        ctx.fed = fed if layer.recompute == "none" else None
        return out.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, middle = ctx.saved_tensors
        layer: Layer = ctx.layer
        kernels = kernels_for(x.device.type)
        rows, dout = x.reshape(middle.shape), gradients[0].reshape(middle.shape)
        normed = layer.normed(middle, 1, kernels)
        fed: FeedForward = ctx.fed or layer.feed(normed, ctx.seeds[2])
        ctx.fed = None
        dproduct, dh = layer.down.input_gradient([dout], ctx.of_down.seed)
        product, *dfed = kernels.swiglu_backward(fed.gate, fed.up, dproduct)
        of_down = layer.down.weight_gradients([dout], dh, product, ctx.of_down)
        hidden = fed.hidden
        del fed, dproduct, product
        dnormed, dh = layer.gate_up.input_gradient(dfed, hidden.seed)
        of_gate_up = layer.gate_up.weight_gradients(dfed, dh, normed, hidden)
        del dfed
        dmiddle = layer.norm_gradient(dnormed, middle, 1, dout, kernels)
        normed = layer.normed(rows, 0, kernels)
        attention: Attention = ctx.attention or layer.attend(
            normed, x.shape[0], ctx.rope, ctx.seeds[0]
        )
        ctx.attention = None
        dattention, dh = layer.o.input_gradient([dmiddle], ctx.of_o.seed)
        of_o = layer.o.weight_gradients([dmiddle], dh, attention.rows(), ctx.of_o)
        dqkv = layer.attention_gradient(attention, dattention, ctx.rope)
        hidden = attention.hidden
        del attention, dattention
        dnormed, dh = layer.qkv.input_gradient(dqkv, hidden.seed)
        of_qkv = layer.qkv.weight_gradients(dqkv, dh, normed, hidden)
        dx = layer.norm_gradient(dnormed, rows, 0, dmiddle, kernels).view_as(x)
        return (dx, None, None, None, *of_qkv, *of_o, *of_gate_up, *of_down)


class Decoder(nn.Module):
    """The language model without embedding and head."""

    def __init__(self, language_model: Any, recompute: Recompute) -> None:
        super().__init__()
        # Not a child: its modules have their place in the model, and hooks stand on each once.
        self.language_model = (language_model,)
        layers = (Layer(module, recompute) for module in language_model.layers)
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last hidden states of embeddings [batch, length, width]."""
        (language_model,) = self.language_model
        positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = (
            t.expand(x.shape[0], -1, -1).flatten(0, 1)[:, None].contiguous()
            for t in language_model.rotary_emb(x, position_ids=positions)
        )
        for layer in self.layers:
            dropping = language_model.training and layer.dropout > 0
            # Drawn from the generator that the loop seeds by step and rank.
            seed = int(torch.randint(2**62, ())) if dropping else None
            x = layer(x, (cos, sin), seed)
        out: Tensor = language_model.norm(x)
        return out
