import torch
from PIL import Image

from llava_ray.models.folder import EMBEDDED


def test_shipped_folder_loads_and_every_row_divides_by_256() -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32)
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 256 == 0, name
    processor = AutoProcessor.from_pretrained(EMBEDDED)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert prompt == "USER: <image>\nRead it. ASSISTANT:"
    batch = processor(images=Image.new("RGB", (300, 200)), text=prompt, return_tensors="pt")
    assert int((batch["input_ids"] == model.config.image_token_index).sum()) == 196
    assert model(**batch).logits.shape[-1] == 1024


def test_shipped_folder_stays_below_25_mb() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 25_000_000
