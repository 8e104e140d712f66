"""The shape of the embedded model: LLaVA-1.5 in small.

Rows of the language model divide by 256, which llama.cpp's K-quants need, and by every group
size up to 128. As in LLaVA-1.5 the last CLIP layer is never used (vision_feature_layer -2).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.embedded.vocabulary import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

IMAGE_SIZE = 224
PATCH_SIZE = 16
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
TOKENS_PER_IMAGE = PATCHES_PER_SIDE**2
MAX_POSITIONS = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Of llava-hf/llava-1.5-7b-hf."""


def model_config() -> "LlavaConfig":
    """Return the config of the embedded model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=256,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    make: Callable[..., LlavaConfig] = LlavaConfig
    return make(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE_ID,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )


def build_model(seed: int) -> "LlavaForConditionalGeneration":
    """Return the model with random fp32 weights, the same ones for the same seed."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(model_config())


def save_processor(folder: Path, tokenizer: Any) -> None:
    """Write tokenizer, image processor and chat template as transformers 4 and 5 read them."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    make: Any = transformers.LlavaProcessor
    processor = make(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    images.save_pretrained(folder)
    # transformers 5 writes the class name TokenizersBackend, which 4.51 (AutoAWQ's) lacks.
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def save_model(model: "LlavaForConditionalGeneration", folder: Path) -> None:
    """Write fp16 weights, config.json and generation_config.json."""
    import torch
    import transformers

    make: Any = transformers.GenerationConfig
    model.generation_config = make(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float16)
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
