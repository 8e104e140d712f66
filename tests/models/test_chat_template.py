"""D1: each model's own chat template, stop token and special tokens."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from llava_ray.errors import ConfigError
from llava_ray.inference.prompts import eos_token_id
from llava_ray.merge.beside import carry, stop_where_the_template_ends
from llava_ray.models.chat_template import (
    TokenizersOwn,
    Turn,
    Vicuna,
    base_tokenizer,
    chat_template,
    inside,
    protect,
)
from llava_ray.models.conversation import IGNORE_INDEX, Sample, encode_prompt, encode_sample
from llava_ray.models.folder import EMBEDDED

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's, SmolLM2's and others', without their default system message."""
CHATML_IN_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
SPECIAL = [
    "<image>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
ENDS = {CHATML: "<|im_end|>", CHATML_IN_PARTS: "<|im_end|>", LLAMA_3: "<|eot_id|>"}


def tokenizer_with(template: str | None) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def conversation(exchanges: int) -> list[Turn]:
    texts = ["What is it?", " Où? \n", "漢字…", "<|im_end|> is text", "5 < 6"]
    return [
        Turn(texts[i], num_images=int(i in (0, 2)), answer=f"Answer {i}: {texts[-1 - i].strip()}")
        for i in range(exchanges)
    ]


def rendered(tokenizer: Any, turns: list[Turn], *, parts: bool) -> str:
    """As a user of transformers would, of protected texts."""
    messages = []
    for turn in turns:
        text = protect(turn.text, tokenizer)
        content: Any = "<image>\n" * turn.num_images + text
        if parts:
            content = [{"type": "image"}] * turn.num_images + [{"type": "text", "text": text}]
        answer: Any = protect(turn.answer, tokenizer)
        if parts:
            answer = [{"type": "text", "text": answer}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("exchanges", range(1, 6))
@pytest.mark.parametrize("template", [CHATML, CHATML_IN_PARTS, LLAMA_3, MISTRAL])
def test_labels_are_the_answers_with_what_ends_them(template: str, exchanges: int) -> None:
    tokenizer = tokenizer_with(template)
    turns = conversation(exchanges)
    written = chat_template(tokenizer).write(turns, "", [3] * len(turns))
    whole = rendered(tokenizer, turns, parts=template == CHATML_IN_PARTS)
    assert written.text == whole.replace("<image>", "<image>" * 3).removesuffix("\n")
    end = ENDS.get(template, "</s>")
    answers = [written.text[start:stop] for start, stop in written.answers]
    assert [a.strip() for a in answers] == [protect(t.answer, tokenizer) + end for t in turns]
    # Independently: between what opens an assistant's message and what ends it.
    opening = {
        LLAMA_3: r"assistant<\|end_header_id\|>\n\n", MISTRAL: r" \[/INST\]"
    }.get(template, r"<\|im_start\|>assistant\n")  # fmt: skip
    found = re.findall(f"{opening}(.*?{re.escape(end)})", written.text, re.DOTALL)
    assert found == answers
    ids = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)
    learned = inside(ids["offset_mapping"], written.answers)
    labels = [i for i, learn in zip(ids["input_ids"], learned, strict=True) if learn]
    assert labels == [
        id for answer in answers for id in tokenizer(answer, add_special_tokens=False)["input_ids"]
    ]
    assert labels[-1] == eos_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL, PLAIN, None])
def test_a_prompt_is_what_stands_before_the_answer(template: str | None) -> None:
    tokenizer = tokenizer_with(template)
    prompt = encode_prompt(tokenizer, [Turn("What?", 1)], [4], system="Be kind.")
    sample = Sample("1", ("a.jpg",), (Turn("What?", 1, "A sign."),))
    encoded = encode_sample(tokenizer, sample, [4], max_length=512, system="Be kind.")
    ids, labels = encoded.input_ids, encoded.labels
    learned = labels.count(IGNORE_INDEX)
    if template != PLAIN:  # Which opens no assistant's message for the model to go on.
        assert ids[:learned] == prompt
    assert labels[learned:] == ids[learned:]
    assert ids[-1] == eos_token_id(tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 4
    assert "Be kind." in tokenizer.decode(prompt)


def test_without_a_template_and_with_that_of_llava_it_is_vicunas() -> None:
    embedded = AutoTokenizer.from_pretrained(EMBEDDED)
    turns = [Turn("Hi", 1, "Yo"), Turn("And?")]
    for tokenizer in (tokenizer_with(None), embedded):
        template = chat_template(tokenizer)
        assert isinstance(template, Vicuna)
        text = template.write(turns, "Be kind.", [1]).text
        assert text == "Be kind. USER: <image>\nHi ASSISTANT: Yo</s>USER: And? ASSISTANT:"


def test_no_special_token_is_made_by_text() -> None:
    tokenizer = tokenizer_with(CHATML)
    ids = encode_prompt(tokenizer, [Turn("".join(SPECIAL), 1)], [2], system="<s>")
    special = [i for i in ids if i in tokenizer.all_special_ids]
    names = tokenizer.convert_ids_to_tokens(special)
    assert names == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<image>", "<image>", "<|im_end|>",
        "<|im_start|>",
    ]  # fmt: skip


def test_a_template_without_an_end_gets_the_tokenizers() -> None:
    template = TokenizersOwn(tokenizer_with(PLAIN))
    text = template.write([Turn("Hi", 0, "Yo"), Turn("And?")], "", [1]).text
    assert text == "user: Hi\nassistant: Yo</s>\nuser: And?\n"


def test_a_template_that_shows_no_question_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shows no question.*chat_template.jinja"):
        chat_template(tokenizer_with("{{ bos_token }}"))


@pytest.mark.parametrize("known", [[2], None])
def test_a_merged_model_stops_elsewhere_where_its_template_ends(
    tmp_path: Path, known: list[int] | None
) -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.save_pretrained(tmp_path)
    if known is not None:
        GenerationConfig(eos_token_id=known).save_pretrained(tmp_path)
    for _ in range(2):
        stop_where_the_template_ends(tmp_path)
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        tree = json.loads((tmp_path / "generation_config.json").read_text())
        assert tree["eos_token_id"] == [stop, *(known or [])]


THINKS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}</s>"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}</s><think>\n{% endif %}"
)
"""DeepSeek-R1's, whose prompt is no beginning of what it writes of an answer."""


@pytest.mark.parametrize("question", ["Is it yes or no?", "yes", "a</think>"])
def test_an_answer_that_stands_in_its_question_too_is_found(question: str) -> None:
    tokenizer = tokenizer_with(THINKS)
    turns = [Turn(question, 1, "no"), Turn(question, 0, "a</think>yes")]
    written = chat_template(tokenizer).write(turns, "", [1])
    answers = [written.text[start:stop] for start, stop in written.answers]
    assert answers == ["no<|im_end|>", "a</think>yes<|im_end|>"]


FORMS = [str, str.upper, lambda text: "".join(chr(ord(c) + 0xFEE0) for c in text)]


@pytest.mark.parametrize("normalizer", ["none", "nfkc", "no format characters"])
@pytest.mark.parametrize("form", FORMS)
def test_no_control_token_is_made_by_text_however_text_is_normalized(
    normalizer: str, form: Callable[[str], str]
) -> None:
    tokenizer = tokenizer_with(CHATML)
    steps = {
        "none": None,
        "nfkc": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        "no format characters": normalizers.Replace(Regex(r"\p{Cf}"), ""),
    }
    if (step := steps[normalizer]) is not None:
        tokenizer.backend_tokenizer.normalizer = step
        for name in SPECIAL:
            # Trained tokens such as Qwen's <tool_call> are not called special.
            tokenizer.add_tokens([AddedToken(name, normalized=True, special=False)])
    control = {tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    kinds = [
        [i for i in encode_prompt(tokenizer, [Turn(text, 1)], [2], system=text) if i in control]
        for text in ("a", " ".join(form(name) for name in SPECIAL))
    ]
    assert kinds[0] == kinds[1]


def test_a_template_that_shows_one_picture_of_two_is_refused() -> None:
    image = "{% if part['type'] == 'image' %}<image>\n"
    first = image.replace("'image' %}", "'image' and loop.first %}")
    template = CHATML_IN_PARTS.replace(image, first + "{% elif part['type'] == 'image' %}")
    with pytest.raises(ConfigError, match="<image> for 4 pictures"):
        chat_template(tokenizer_with(template))


def test_a_tokenizer_that_ends_every_text_leaves_prompts_open() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")],
    )
    ids = encode_prompt(tokenizer, [Turn("What?", 1)], [2])
    end = tokenizer.eos_token_id
    assert ids[0] == tokenizer.bos_token_id and end not in ids
    sample = Sample("1", ("a.jpg",), (Turn("What?", 1, "A sign."),))
    encoded = encode_sample(tokenizer, sample, [2], max_length=512)
    assert encoded.input_ids.count(end) == encoded.labels.count(end) == 1


def test_the_last_prompt_is_trained_as_it_will_be_asked() -> None:
    turns = [Turn("What is it?", 1, "no"), Turn("And there?", 0, "yes")]
    for template in (THINKS, LAST_ALONE):
        own = chat_template(tokenizer_with(template))
        trained = own.write(turns, "Be kind.", [1])
        served = own.write([*turns[:-1], Turn("And there?")], "Be kind.", [1])
        start, stop = trained.answers[-1]
        assert trained.text.startswith(served.text)
        assert trained.text[start:stop].startswith("yes")


LAST_ALONE = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "<|im_start|>{{ m.content }}</s>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
"""The system text stands in the last question alone, as Mistral's."""


@pytest.mark.parametrize("text", ["@@@", "@@@@", "a@@@@@@@b"])
def test_control_tokens_that_overlap_are_all_parted(text: str) -> None:
    tokenizer = tokenizer_with("{% for m in messages %}@@{{ m.content }}</s>{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["@@"]})
    assert "@@" not in protect(text, tokenizer)


def test_without_an_eos_token_answers_end_where_the_engine_stops() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = tokenizer.eos_token = None
    assert eos_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")


def write_base(folder: Path, name: str, template: object) -> Path:
    """Write the embedded model's small files with another template in one of them alone."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").unlink()
    path = folder / name
    if name.endswith(".jinja"):
        path.write_text(str(template))
        return folder
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**tree, "chat_template": template}))
    return folder


PLACES = (
    "chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, CHATML_IN_PARTS, LLAMA_3, MISTRAL, None])
@pytest.mark.parametrize("name", PLACES)
def test_others_ask_a_merged_model_as_it_was_trained(
    tmp_path: Path, name: str, template: str | None
) -> None:
    base = write_base(tmp_path / "base", name, template) if template else tmp_path / "base"
    if template is None:
        write_base(base, "tokenizer_config.json", None)
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copy(EMBEDDED / "config.json", merged)
    carry(base, merged)
    turns = [Turn("What is it?", 1)]
    trained = chat_template(base_tokenizer(base)).write(turns, "", [1]).text
    again = chat_template(AutoTokenizer.from_pretrained(merged)).write(turns, "", [1]).text
    assert again == trained
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    processor = AutoProcessor.from_pretrained(merged, backend="pil")
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert theirs == trained


def test_of_named_templates_the_default_is_carried(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]
    base = write_base(tmp_path / "base", "tokenizer_config.json", named)
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copy(EMBEDDED / "config.json", merged)
    carry(base, merged)
    assert (merged / "chat_template.jinja").read_text().endswith(CHATML)
    assert "chat_template" not in json.loads((merged / "tokenizer_config.json").read_text())
