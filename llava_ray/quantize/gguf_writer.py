"""A Hugging Face LLaVA folder as llama.cpp's pair of files: text model and mmproj.

Tensors go from safetensors to GGUF one by one, so memory holds one tensor at a time. Every
tensor of the folder is written or dropped by a rule; one that is neither ends the conversion.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)

from llava_ray.errors import VariantError
from llava_ray.inference.torch.cache import head_size
from llava_ray.inference.torch.llama import windows_of
from llava_ray.models.family import VisionShape, family_of
from llava_ray.models.tensors import (
    copy_sidecars,
    empty_model,
    is_tied,
    module_name,
    shards,
    weight_shapes,
)
from llava_ray.quantize.gguf_vocab import add_vocabulary, check_vocabulary

if TYPE_CHECKING:
    import torch

_F32, _F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
_TORCH_DTYPES = {_F32: "float32", _F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}

# Buffers that older transformers saved beside the weights.
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Entry:
    """One tensor on its way into a file."""

    target: str
    source: str
    heads: int | None = None
    """Of a query or key projection, whose rows are reordered."""


def write_f32_folder(merged: Path, out: Path) -> None:
    """Write a folder's F32 pair into an empty one, with all that the engine reads beside it."""
    copy_sidecars(merged, out)
    shutil.copyfile(merged / "config.json", out / "config.json")
    write_pair(merged, out / "llava-f32.gguf", out / "mmproj-f32.gguf", precision="f32")


def lossless_precision(merged: Path) -> str:
    """Return the smallest precision that holds every weight as it is."""
    found = {stored.get_dtype() for stored in _open(merged).values()}
    return {"F16": "f16", "BF16": "bf16"}.get(found.pop(), "f32") if len(found) == 1 else "f32"


_VISION_ACTIVATIONS = ("quick_gelu", "gelu", "silu")


def write_pair(merged: Path, text: Path, mmproj: Path, *, precision: str) -> None:
    """Write a LLaVA folder as a text GGUF and an mmproj GGUF.

    precision: f32, f16 or bf16 for the text model's matrices; the mmproj gets f32 beside f32,
    else f16. Raises VariantError for a model that llama.cpp cannot run, and for any tensor that
    is missing or left over.
    """
    from transformers import AutoConfig

    check_convertible(merged)
    config = AutoConfig.from_pretrained(merged)
    checkpoint = _open(merged)
    depth = _vision_depth(config)
    entries = _entries(config, checkpoint, depth)
    text_type = GGMLQuantizationType[precision.upper()]
    writer = GGUFWriter(str(text), "llama")
    _describe_text(writer, config.text_config, merged, text_type)
    factors = _rope_factors(config.text_config)
    _stream(writer, checkpoint, [e for e in entries if is_text(e.source)], text_type, factors)
    mmproj_type = _F32 if text_type is _F32 else _F16
    writer = GGUFWriter(str(mmproj), "clip")
    _describe_vision(writer, config, family_of(merged).vision, depth, mmproj_type)
    _stream(writer, checkpoint, [e for e in entries if not is_text(e.source)], mmproj_type)


def check_convertible(folder: Path) -> None:
    """Raise VariantError for a model that llama.cpp cannot run, by config, names and tokenizer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    depth = _vision_depth(config)
    _check_text(config.text_config)
    if not getattr(config, "multimodal_projector_bias", True):
        raise VariantError("multimodal_projector_bias is false: llama.cpp's mlp needs biases")
    if config.projector_hidden_act != "gelu":
        raise VariantError(
            f"projector_hidden_act {config.projector_hidden_act!r}: llama.cpp's mlp has gelu"
        )
    checkpoint = {module_name(name): shape for name, shape in weight_shapes(folder).items()}
    _account(checkpoint, _entries(config, checkpoint, depth), depth)
    if config.vision_config.hidden_act not in _VISION_ACTIVATIONS:
        raise VariantError(
            f"vision hidden_act {config.vision_config.hidden_act!r}: llama.cpp's CLIP has "
            f"{', '.join(_VISION_ACTIVATIONS)}"
        )
    check_vocabulary(folder)


def is_text(name: str) -> bool:
    """Say whether a transformers 5 module or parameter is of the text model."""
    return name.startswith(("model.language_model.", "lm_head"))


def gguf_names(config: Any) -> Callable[[str], str | None]:
    """Return what gives a transformers 5 parameter's name in GGUF, None where there is none."""
    text = get_tensor_name_map(MODEL_ARCH.LLAMA, config.text_config.num_hidden_layers)
    # Three at least: the numbers of the projector's layers are looked up like those of blocks.
    blocks = max(3, config.vision_config.num_hidden_layers)
    vision = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)

    def target(name: str) -> str | None:
        if is_text(name):
            return text.get_name(name.replace("language_model.", "", 1), (".weight", ".bias"))
        name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.", 1)
        found = vision.get_name(name, (".weight", ".bias"))
        # llama.cpp's numbers are those of the layers in LLaVA's nn.Sequential: 1 is the GELU.
        return found and found.replace("mm.1.", "mm.0.")

    return target


def permute_heads(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder a query or key projection's rows from half-rotary to llama.cpp's interleaved form.

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
    """
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _open(merged: Path) -> dict[str, Any]:
    """Open every tensor as a slice of safetensors, by its name as transformers 5's parameter."""
    from safetensors import safe_open

    files: list[Any] = [safe_open(path, framework="pt") for path in shards(merged)]
    return {module_name(key): file.get_slice(key) for file in files for key in file.offset_keys()}


def _entries(config: Any, checkpoint: Mapping[str, Any], depth: int) -> list[Entry]:
    """Return what of a LLaVA of this config is written, in the order of its parameters."""
    names = list(empty_model(config).state_dict())
    text, target_of = config.text_config, gguf_names(config)
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    entries = []
    for source in names:
        # Without an output tensor llama.cpp uses the embedding, as tied weights mean.
        tied = source == "lm_head.weight" and is_tied(config) and source not in checkpoint
        target = target_of(source)
        if target is not None and not tied and not _drop(source, depth):
            rotary = heads.get(source.split(".")[-2]) if is_text(source) else None
            entries.append(Entry(target, source, rotary))
    return entries


def _account(checkpoint: Mapping[str, Any], entries: list[Entry], depth: int) -> None:
    """Raise VariantError unless each tensor is used once or dropped by a rule."""
    wanted = {entry.source for entry in entries}
    missing = sorted(name for name in wanted if name not in checkpoint)
    if missing:
        raise VariantError(f"{len(missing)} tensors are missing: {_some(missing)}")
    left = [name for name in sorted(checkpoint) if name not in wanted and not _drop(name, depth)]
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
    if isinstance(selected, list) and len(selected) == 1:
        selected = selected[0]
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


def _check_text(config: Any) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise VariantError(f"rope_type {rope['rope_type']!r}: 'default' and 'llama3' are converted")
    window = max((each or 0 for each in windows_of(config)), default=0)
    if 0 < window < config.max_position_embeddings:
        raise VariantError(
            f"the model attends to a window of {window} tokens: llama.cpp's Llama sees all"
        )
    if config.hidden_act != "silu":
        raise VariantError(f"text hidden_act {config.hidden_act!r}: llama.cpp's Llama has silu")


def _describe_text(
    writer: GGUFWriter, config: Any, merged: Path, tensor_type: GGMLQuantizationType
) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    head_dim = head_size(config)
    writer.add_type("model")
    writer.add_name("LLaVA")
    writer.add_file_type(_file_type(tensor_type))
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
    add_vocabulary(writer, merged, config.vocab_size)


def _describe_vision(
    writer: GGUFWriter,
    config: Any,
    shape: VisionShape,
    depth: int,
    tensor_type: GGMLQuantizationType,
) -> None:
    vision = config.vision_config
    writer.add_type("mmproj")
    writer.add_name("LLaVA")
    writer.add_file_type(_file_type(tensor_type))
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
    writer.add_vision_image_mean(list(shape.mean))
    writer.add_vision_image_std(list(shape.std))
    _describe_activation(writer, vision.hidden_act)


def _describe_activation(writer: GGUFWriter, name: str) -> None:
    # Neither flag means quick_gelu.
    writer.add_vision_use_gelu(name == "gelu")
    writer.add_vision_use_silu(name == "silu")


def _file_type(kind: GGMLQuantizationType) -> LlamaFileType:
    return LlamaFileType.ALL_F32 if kind is _F32 else LlamaFileType[f"MOSTLY_{kind.name}"]


def _rope_factors(config: Any) -> "np.ndarray[Any, np.dtype[np.float32]] | None":
    """Return by what llama.cpp divides each rotary frequency, None where it is 1.

    Those of Llama 3's scaling are the ratio of plain frequencies to transformers' own.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    plain = rope["rope_theta"] ** -(np.arange(0, head_size(config), 2) / head_size(config))
    return np.asarray(plain / scaled.double().numpy(), dtype=np.float32)


def _stream(
    writer: GGUFWriter,
    checkpoint: dict[str, Any],
    entries: list[Entry],
    kind: GGMLQuantizationType,
    rope_factors: "np.ndarray[Any, np.dtype[np.float32]] | None" = None,
) -> None:
    """Write header and tensors, holding one tensor at a time."""
    kinds = []
    if rope_factors is not None:
        size_bytes = rope_factors.nbytes
        writer.add_tensor_info(
            "rope_freqs.weight", rope_factors.shape, np.dtype("f4"), size_bytes, _F32
        )
    for entry in entries:
        shape = checkpoint[entry.source].get_shape()
        # llama.cpp adds vectors and positions to F32 activations, and takes them in F32 only.
        kinds.append(_F32 if len(shape) == 1 or entry.target == "v.position_embd.weight" else kind)
        size_bytes = math.prod(shape) * GGML_QUANT_SIZES[kinds[-1]][1]
        # NumPy's dtype is not looked at beside GGUF's.
        writer.add_tensor_info(entry.target, shape, np.dtype("f4"), size_bytes, kinds[-1])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope_factors is not None:
            writer.write_tensor_data(rope_factors)
        for entry, each in zip(entries, kinds, strict=True):
            writer.write_tensor_data(_bytes_of(entry, checkpoint[entry.source][:], each))
    finally:
        writer.close()


def _bytes_of(
    entry: Entry, source: "torch.Tensor", kind: GGMLQuantizationType
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    import torch

    tensor = source.to(getattr(torch, _TORCH_DTYPES[kind]))
    if kind is _F16 and source.dtype is not torch.float16 and not tensor.isfinite().all():
        raise VariantError(
            f"{entry.source} has values up to {source.abs().max().item():.3g}, beyond what "
            "f16 holds; use gguf-bf16 or gguf-f32"
        )
    if entry.heads:
        tensor = permute_heads(tensor, entry.heads)
    return tensor.contiguous().view(torch.uint8).numpy()
