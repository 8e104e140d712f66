"""A Hugging Face LLaVA folder as llama.cpp's pair of files: text model and mmproj.

Tensors go from safetensors to GGUF one by one, so memory holds one tensor at a time. Every
tensor of the folder is written or dropped by a rule; one that is neither ends the conversion.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from llava_ray.errors import VariantError
from llava_ray.models.images import CLIP_MEAN, CLIP_STD
from llava_ray.models.tensors import module_name
from llava_ray.quantize.gguf_vocab import read_vocabulary, write_vocabulary

if TYPE_CHECKING:
    import numpy as np
    import torch

Transform = Callable[["torch.Tensor"], "torch.Tensor"]

_F32, _F16, _BF16 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
)
PRECISIONS = {"f32": _F32, "f16": _F16, "bf16": _BF16}
_FILE_TYPE = {
    _F32: LlamaFileType.ALL_F32,
    _F16: LlamaFileType.MOSTLY_F16,
    _BF16: LlamaFileType.MOSTLY_BF16,
}

_TEXT = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
}
_TEXT_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_VISION = {
    "model.vision_tower.embeddings.class_embedding": "v.class_embd",
    "model.vision_tower.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "model.vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight",
    "model.vision_tower.pre_layrnorm.weight": "v.pre_ln.weight",
    "model.vision_tower.pre_layrnorm.bias": "v.pre_ln.bias",
    # llama.cpp's numbers are those of the layers in LLaVA's nn.Sequential: 1 is the GELU.
    "model.multi_modal_projector.linear_1.weight": "mm.0.weight",
    "model.multi_modal_projector.linear_1.bias": "mm.0.bias",
    "model.multi_modal_projector.linear_2.weight": "mm.2.weight",
    "model.multi_modal_projector.linear_2.bias": "mm.2.bias",
}
_VISION_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# Buffers that older transformers saved beside the weights.
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Entry:
    """One tensor on its way into a file."""

    target: str
    source: str
    transform: Transform | None = None


class Checkpoint:
    """The safetensors of a folder, by the names of transformers 5's parameters."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._where: dict[str, tuple[Any, str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened: Any = safe_open(path, framework="pt")
            for key in opened.keys():  # noqa: SIM118 - not a dict
                self._where[module_name(key)] = (opened, key)
        if not self._where:
            raise VariantError(f"no safetensors in {folder}")

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._where)

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape without reading it."""
        opened, key = self._where[name]
        return list(opened.get_slice(key).get_shape())

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor."""
        opened, key = self._where[name]
        tensor: torch.Tensor = opened.get_tensor(key)
        return tensor

    def lossless_precision(self) -> str:
        """Return the smallest precision that holds every weight as it is."""
        found = {opened.get_slice(key).get_dtype() for opened, key in self._where.values()}
        return {"F16": "f16", "BF16": "bf16"}.get(found.pop(), "f32") if len(found) == 1 else "f32"


def write_pair(merged: Path, text: Path, mmproj: Path, *, precision: str) -> None:
    """Write a LLaVA folder as a text GGUF and an mmproj GGUF.

    precision: f32, f16 or bf16 for the text model's matrices; the mmproj gets f32 beside f32,
    else f16. Raises VariantError for a model that llama.cpp cannot run, and for any tensor that
    is missing or left over.
    """
    from transformers import LlavaConfig

    config = LlavaConfig.from_pretrained(merged)
    checkpoint = Checkpoint(merged)
    depth = _vision_depth(config)
    text_entries = _text_entries(config.text_config, checkpoint)
    vision_entries = _vision_entries(depth)
    _account(checkpoint, [*text_entries, *vision_entries], depth)
    text_type = PRECISIONS[precision]
    writer = GGUFWriter(str(text), "llama")
    _describe_text(writer, config.text_config, merged, text_type)
    _stream(writer, checkpoint, text_entries, text_type)
    mmproj_type = _F32 if text_type is _F32 else _F16
    writer = GGUFWriter(str(mmproj), "clip")
    _describe_vision(writer, config, depth, mmproj_type)
    _stream(writer, checkpoint, vision_entries, mmproj_type)


def text_targets(config: Any) -> dict[str, str]:
    """Return the text model's tensor names in GGUF by those of transformers 5's parameters."""
    targets = {**_TEXT, "lm_head.weight": "output.weight"}
    for layer in range(config.num_hidden_layers):
        for source, target in _TEXT_LAYER.items():
            targets[f"model.language_model.layers.{layer}.{source}"] = f"blk.{layer}.{target}"
    return targets


def permute_heads(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder a query or key projection's rows from half-rotary to llama.cpp's interleaved form.

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
    """
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _text_entries(config: Any, checkpoint: Checkpoint) -> list[Entry]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    entries = []
    for source, target in text_targets(config).items():
        # Without an output tensor llama.cpp uses the embedding, as tied weights mean.
        if target == "output.weight" and config.tie_word_embeddings and source not in checkpoint:
            continue
        count = heads.get(target.split(".")[-2])
        entries.append(Entry(target, source, _permutation(count) if count else None))
    return entries


def _permutation(heads: int) -> Transform:
    return lambda weight: permute_heads(weight, heads)


def _vision_entries(depth: int) -> list[Entry]:
    entries = [Entry(target, source) for source, target in _VISION.items()]
    for layer in range(depth):
        for source, target in _VISION_LAYER.items():
            for part in ("weight", "bias"):
                name = f"model.vision_tower.encoder.layers.{layer}.{source}.{part}"
                entries.append(Entry(f"v.blk.{layer}.{target}.{part}", name))
    return entries


def _account(checkpoint: Checkpoint, entries: list[Entry], depth: int) -> None:
    """Raise VariantError unless each tensor is used once or dropped by a rule."""
    wanted = {entry.source for entry in entries}
    missing = sorted(name for name in wanted if name not in checkpoint)
    if missing:
        raise VariantError(f"{len(missing)} tensors are missing: {_some(missing)}")
    left = [name for name in checkpoint.names() if name not in wanted and not _drop(name, depth)]
    if left:
        raise VariantError(
            f"{len(left)} tensors have no place in llama.cpp's LLaVA: {_some(left)}; "
            "a plain LLaVA-1.5 without biases or adapters is needed"
        )


def _drop(name: str, depth: int) -> bool:
    """Say whether a tensor does not take part: buffers, and CLIP above the selected layer."""
    if name.endswith(_BUFFERS) or name.startswith("model.vision_tower.post_layernorm."):
        return True
    head, found, rest = name.partition("model.vision_tower.encoder.layers.")
    return bool(found) and not head and int(rest.split(".")[0]) >= depth


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _vision_depth(config: Any) -> int:
    """Return how many CLIP layers run before the selected hidden state."""
    selected, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(selected, int):
        raise VariantError(f"vision_feature_layer {selected}: llama.cpp takes one layer only")
    if config.vision_feature_select_strategy != "default":
        raise VariantError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}: "
            "llama.cpp always drops the class token, which is 'default'"
        )
    depth = selected if selected >= 0 else layers + 1 + selected
    if not 0 < depth <= layers:
        raise VariantError(f"vision_feature_layer {selected} is not one of {layers} layers")
    return depth


def _describe_text(
    writer: GGUFWriter, config: Any, merged: Path, tensor_type: GGMLQuantizationType
) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise VariantError(f"rope_type {rope['rope_type']!r}: only 'default' is converted")
    if config.hidden_act != "silu":
        raise VariantError(f"text hidden_act {config.hidden_act!r}: llama.cpp's Llama has silu")
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name("LLaVA")
    writer.add_file_type(_FILE_TYPE[tensor_type])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    write_vocabulary(writer, read_vocabulary(merged, config.vocab_size))


def _describe_vision(
    writer: GGUFWriter, config: Any, depth: int, tensor_type: GGMLQuantizationType
) -> None:
    vision = config.vision_config
    if config.projector_hidden_act != "gelu":
        raise VariantError(
            f"projector_hidden_act {config.projector_hidden_act!r}: llama.cpp's mlp has gelu"
        )
    writer.add_type("mmproj")
    writer.add_name("LLaVA")
    writer.add_file_type(_FILE_TYPE[tensor_type])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(depth)
    # Named, because without it llama.cpp leaves out one more layer.
    writer.add_array("clip.vision.feature_layer", [depth])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(CLIP_MEAN))
    writer.add_vision_image_std(list(CLIP_STD))
    _describe_activation(writer, vision.hidden_act)


def _describe_activation(writer: GGUFWriter, name: str) -> None:
    # Neither flag means quick_gelu.
    flags: Mapping[str, tuple[bool, bool]] = {
        "quick_gelu": (False, False),
        "gelu": (True, False),
        "silu": (False, True),
    }
    if name not in flags:
        raise VariantError(f"vision hidden_act {name!r}: llama.cpp's CLIP has {', '.join(flags)}")
    use_gelu, use_silu = flags[name]
    writer.add_vision_use_gelu(use_gelu)
    writer.add_vision_use_silu(use_silu)


def _stream(
    writer: GGUFWriter,
    checkpoint: Checkpoint,
    entries: list[Entry],
    tensor_type: GGMLQuantizationType,
) -> None:
    """Write header and tensors, holding one tensor at a time."""
    import numpy as np

    numpy_type: dict[GGMLQuantizationType, np.dtype[Any]] = {
        _F32: np.dtype("f4"),
        _F16: np.dtype("f2"),
        _BF16: np.dtype("u2"),
    }
    plan = [(entry, _tensor_type(entry, checkpoint, tensor_type)) for entry in entries]
    for entry, kind in plan:
        shape = checkpoint.shape(entry.source)
        dtype = numpy_type[kind]
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(entry.target, shape, dtype, size_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in _arrays(checkpoint, plan):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _tensor_type(
    entry: Entry, checkpoint: Checkpoint, wanted: GGMLQuantizationType
) -> GGMLQuantizationType:
    # llama.cpp adds vectors and positions to F32 activations, and takes them in F32 only.
    one_dimensional = len(checkpoint.shape(entry.source)) == 1
    return _F32 if one_dimensional or entry.target == "v.position_embd.weight" else wanted


def _arrays(
    checkpoint: Checkpoint, plan: list[tuple[Entry, GGMLQuantizationType]]
) -> Iterator["np.ndarray[Any, Any]"]:
    import torch

    torch_type = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
    for entry, kind in plan:
        source = checkpoint.read(entry.source)
        tensor = source.to(torch_type[kind])
        if kind is _F16 and source.dtype is not torch.float16 and not tensor.isfinite().all():
            raise VariantError(
                f"{entry.source} has values up to {source.abs().max().item():.3g}, beyond what "
                "f16 holds; use gguf-bf16 or gguf-f32"
            )
        if entry.transform is not None:
            tensor = entry.transform(tensor)
        tensor = tensor.contiguous()
        yield tensor.view(torch.uint16).numpy() if kind is _BF16 else tensor.numpy()
