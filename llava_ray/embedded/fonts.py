"""The fonts of generated signs, found in installed font packages; some families are held out."""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from llava_ray.errors import ConfigError

HELD_OUT_FAMILIES = ("Caladea", "FredokaOne", "HankenGrotesk")

PACKAGES = {
    "font_amatic_sc": "AmaticSC-*.ttf",
    "font_caladea": "Caladea-*.ttf",
    "font_fredoka_one": "FredokaOne-*.ttf",
    "font_hanken_grotesk": "HankenGrotesk-*.otf",
    "font_intuitive": "Intuitive.ttf",
    "font_manrope": "Manrope-*.ttf",
    "font_roboto": "Roboto-*.ttf",
    "font_source_serif_pro": "SourceSerifPro-*.ttf",
    "matplotlib": "*.ttf",
}

MATPLOTLIB_FACES = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono "
    "DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic "
    "DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta "
    "cmb10 cmr10 cmss10 cmtt10"
)
"""The others hold mathematical symbols."""

REFERENCE_SIZE = 64


@dataclass(frozen=True)
class Face:
    """One font file."""

    path: Path

    @property
    def family(self) -> str:
        """The file's name up to its style."""
        return self.path.stem.partition("-")[0]

    @property
    def held_out(self) -> bool:
        """Whether pretraining never shows this family."""
        return self.family in HELD_OUT_FAMILIES

    @property
    def capitals_only(self) -> bool:
        """Whether small letters look like capitals, so that case cannot be read."""
        return self.family == "AmaticSC"

    def width(self, text: str, size: float) -> float:
        """Return the width of a line in pixels, kerning left out."""
        return sum(_advance(self.path, letter) for letter in text) * size / REFERENCE_SIZE

    def advances(self, text: str, size: float) -> list[float]:
        """Return the width of each character in pixels."""
        return [_advance(self.path, letter) * size / REFERENCE_SIZE for letter in text]


@lru_cache(maxsize=2048)
def open_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at a size in pixels; kept open, as opening costs more than a line of text."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16384)
def _advance(path: Path, letter: str) -> float:
    return float(open_font(path, REFERENCE_SIZE).getlength(letter))


def find_faces() -> list[Face]:
    """Return the usable faces of the installed font packages, sorted by file name.

    Raises ConfigError naming the packages that are missing.
    """
    faces, missing = [], []
    for name, pattern in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            missing.append(name.replace("_", "-"))
            continue
        faces += [
            Face(path)
            for path in Path(spec.origin).parent.rglob(pattern)
            if "VariableFont" not in path.name
            and (name != "matplotlib" or path.stem in MATPLOTLIB_FACES.split())
        ]
    if missing:
        raise ConfigError(
            f"scene text needs the package(s) {', '.join(sorted(missing))}: "
            "pip install 'llava_ray[scene-text]'"
        )
    return sorted(faces, key=lambda face: face.path.name)
