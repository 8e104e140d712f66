"""Which other programs open a variant's folder, by what they were seen or read to do.

A rule is of one reader and one method; what a version of llava_ray or of a reader changes is
changed here alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from llava_ray.config.run import Reader

Verdict = Literal["opens", "opens with", "refuses"]


@dataclass(frozen=True)
class Entry:
    """What one reader does with a variant's folder."""

    reader: Reader
    version: str
    verdict: Verdict
    detail: str
    """What it opens with, or why it refuses."""
    same_pixels: bool | None
    """Whether it shows the model the pixels that were trained on; None where it refuses."""
    evidence: Literal["run by a test", "tried", "read"]
    """How it is known."""


_VERSIONS: Mapping[Reader, str] = {
    "transformers-4": "4.57.6", "transformers-5": "5.23.0", "vllm": "0.22.1, read to 0.33",
    "sglang": "of November 2026", "lmdeploy": "of November 2026",
    "llama.cpp": "of llama-cpp-python 0.3.36", "ollama": "of November 2026",
}  # fmt: skip
_NO_WEIGHTS = "it finds no weights: HQQ's lie in a folder of their own, for it would misread them"
_NO_GGUF = "it reads no GGUF of a LLaVA"
_NO_READER = "it has no reader of this layout"
_STRATEGY = "it knows no vision_feature_select_strategy 'default'"
_OLD = "transformers below 4.52, which it loads towers by"

_RULES: Mapping[Reader, Mapping[str, tuple[Verdict, str, bool, str]]] = {
    "transformers-4": {
        "none": ("opens", "", True, "tried"),
        "bnb": ("opens with", "bitsandbytes", True, "tried"),
        "awq": ("refuses", "AutoAWQ 0.2.9 does not import beside it", False, "tried"),
        "hqq": ("refuses", _NO_WEIGHTS, False, "read"),
        "gguf": ("refuses", _NO_GGUF, False, "read"),
    },
    "transformers-5": {
        "none": ("opens", "", True, "run by a test"),
        "bnb": ("opens with", "bitsandbytes", True, "run by a test"),
        "awq": ("opens with", "gptqmodel", True, "tried"),
        "hqq": ("refuses", _NO_WEIGHTS, False, "run by a test"),
        "gguf": ("refuses", _NO_GGUF, False, "read"),
    },
    "vllm": {
        "none": ("opens", "", True, "read"),
        "awq": ("opens", "", True, "tried"),
        "bnb": ("refuses", "it has bitsandbytes as a plugin alone", False, "tried"),
        "gguf": ("refuses", "it has GGUF as a plugin alone", False, "read"),
    },
    "sglang": dict.fromkeys(("none", "awq", "bnb"), ("refuses", _STRATEGY, False, "read")),
    "lmdeploy": {
        "none": ("opens with", _OLD, True, "read"),
        "awq": ("opens with", f"{_OLD}, and groups of 128", True, "read"),
    },
    "llama.cpp": {"gguf": ("opens", "", False, "tried")},
    "ollama": {"gguf": ("opens with", "a Modelfile with its chat template", False, "read")},
}
"""By reader and method; what is not here is refused, as read."""


def passport(slug: str) -> list[Entry]:
    """Return an entry per reader."""
    method, found = slug.partition("-")[0], []
    for reader in get_args(Reader):
        rule = _RULES[reader].get(method, ("refuses", _NO_READER, False, "read"))
        verdict, detail, same, evidence = rule
        pixels = None if verdict == "refuses" else same
        found.append(Entry(reader, _VERSIONS[reader], verdict, detail, pixels, evidence))  # type: ignore[arg-type]
    return found


def refusals(slug: str, readers: Sequence[Reader]) -> list[str]:
    """Say of each of these readers that refuses a variant why it does."""
    return [
        f"{entry.reader} {entry.version} does not open it: {entry.detail}"
        for entry in passport(slug)
        if entry.reader in readers and entry.verdict == "refuses"
    ]
