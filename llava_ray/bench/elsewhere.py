"""Other programs answer by the code of our model cards; their words beside our engine's.

Each variant is laid out as a repository of the hub would hold it, and its card's code is run there
as it stands, on pictures that are no squares.
"""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava_ray.bench import results
from llava_ray.config.run import RunConfig
from llava_ray.publish import find_variant, lay_out

logger = logging.getLogger(__name__)

PICTURES = (
    ("OPEN LATE", 600, 240), ("FRESH BREAD", 800, 300), ("PLATFORM 9", 300, 700),
    ("EXIT", 900, 200), ("NO PARKING", 240, 640), ("TICKETS", 500, 333),
)  # fmt: skip
"""What stands on them, width and height."""
CHECKED_WORDS = 24
_FENCE = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)


def run(config: RunConfig, out: Path, pythons: Mapping[str, Path], tools: Path | None) -> Path:
    """Ask each of quantize.variants by every reader that is here; write how many answers are ours.

    pythons: by a reader of passport.py the Python that has it. tools: the folder of llama.cpp's
    programs. Raises ConfigError for a slug that was not measured and chosen from.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for slug in config.quantize.variants:
            folder = lay_out(find_variant(config, slug), Path(scratch) / slug)
            blocks = _FENCE.findall((folder / "README.md").read_text(encoding="utf-8"))
            ours = _answers(folder, [sys.executable, "-c", _own(blocks)])
            for reader, command in _commands(blocks, pythons, tools):
                row: dict[str, Any] = {"variant": slug, "reader": reader, "pictures": len(PICTURES)}
                try:
                    theirs = _answers(folder, command)
                    same = [_first(a) == _first(b) for a, b in zip(ours, theirs, strict=True)]
                    row |= {"same_answers": sum(same), "ours": ours[0], "theirs": theirs[0]}
                except subprocess.CalledProcessError as error:
                    row["failed"] = (error.stderr.strip().splitlines() or ["no reason"])[-1][:300]
                logger.info("%s", row)
                rows.append(row | {"versions": _versions(command)})
    return results.write(out, "elsewhere", {"rows": rows})


def _own(blocks: Sequence[tuple[str, str]]) -> str:
    return next(code for _, code in blocks if "llava_ray" in code)


def _commands(
    blocks: Sequence[tuple[str, str]], pythons: Mapping[str, Path], tools: Path | None
) -> list[tuple[str, list[str]]]:
    """Return each reader and what runs the card's code for it."""
    found: list[tuple[str, list[str]]] = []
    path = f"PATH={tools}:{os.environ['PATH']}"
    for language, code in blocks:
        if language == "bash" and tools is not None:
            found.append(("llama.cpp", ["env", path, "bash", "-c", code]))
        elif language == "python" and "llava_ray" not in code:
            asked = "vllm" if "from vllm" in code else "transformers"
            found += [
                (reader, [str(python), "-c", code])
                for reader, python in pythons.items()
                if reader.partition("-")[0] == asked
            ]
    return found


def _answers(folder: Path, command: Sequence[str]) -> list[str]:
    """Return what a command prints last beside each picture; raises CalledProcessError."""
    found = []
    for words, width, height in PICTURES:
        image = Image.new("RGB", (width, height), (236, 226, 200))
        size = int(min(height / 3, 1.5 * width / len(words)))
        ImageDraw.Draw(image).text((width // 9, height // 3), words, (20, 20, 40), font_size=size)
        image.save(folder / "photo.jpg", quality=95)
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=900, check=True
        )
        found.append(done.stdout.strip().splitlines()[-1].strip() if done.stdout.strip() else "")
    return found


def _first(answer: str) -> list[str]:
    return answer.split()[:CHECKED_WORDS]


def _versions(command: Sequence[str]) -> dict[str, str]:
    """Return the versions of what may be asked, of a Python's packages."""
    if command[0] == "env":
        return {}
    code = (
        "from importlib.metadata import distributions as d\n"
        "w = ('torch', 'transformers', 'vllm', 'gptqmodel', 'bitsandbytes')\n"
        "print(*(f'{x.name}={x.version}' for x in d() if x.name in w))"
    )
    done = subprocess.run([command[0], "-c", code], capture_output=True, text=True, check=False)
    # A package may stand there twice, the first of which is imported.
    pairs = [pair.partition("=") for pair in reversed(done.stdout.split())]
    return {name: version for name, _, version in pairs}
