"""The typefaces the demo pictures are set in. All come from packages on PyPI, so the pictures are the same everywhere."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from lensc.backends.errors import UnavailableError

FACES = (
    *(("font_roboto", f"files/Roboto-{w}.ttf") for w in ("Regular", "Medium", "Bold", "Italic")),
    *(("font_source_sans_pro", f"files/SourceSansPro-{w}.ttf") for w in ("Regular", "Semibold", "Bold", "It")),
    *(("font_source_serif_pro", f"files/SourceSerifPro-{w}.ttf") for w in ("Regular", "Semibold", "Bold", "It")),
    *(("font_caladea", f"files/Caladea-{w}.ttf") for w in ("Regular", "Bold", "Italic")),
    *(("font_hanken_grotesk", f"files/HankenGrotesk-{w}.otf") for w in ("Regular", "Medium", "Bold", "Italic")),
    *(("font_manrope", f"files/Manrope-{w}.ttf") for w in ("Regular", "Medium", "Bold")),
    *(("matplotlib", f"mpl-data/fonts/ttf/DejaVu{w}.ttf") for w in ("Sans", "Sans-Bold", "SansMono", "SansMono-Bold")),
    *(("matplotlib", f"mpl-data/fonts/ttf/DejaVu{w}.ttf") for w in ("Serif", "Serif-Bold")),
    ("PIL", ""),
)
"""(package, file in the package); Pillow's built-in face has no file."""


@lru_cache(maxsize=1)
def _paths() -> tuple[Path | None, ...]:
    paths: list[Path | None] = []
    missing: list[str] = []
    for package, file in FACES:
        spec = find_spec(package)
        root = Path(spec.origin).parent if spec and spec.origin else None
        if root is None or (file and not (root / file).is_file()):
            missing.append(f"{package}/{file}")
        paths.append(root / file if root and file else None)
    if missing:
        raise UnavailableError(f"demo fonts not found: {', '.join(missing)}; pip install 'lensc[demo]'")
    return tuple(paths)


@lru_cache(maxsize=1024)
def font(face: int, size: int) -> ImageFont.FreeTypeFont:
    """Face number `face` of FACES at `size` pixels. Raises UnavailableError if the font packages are missing.

    Basic layout: the positions of single characters are then the advance widths, with any build of Pillow.
    """
    path = _paths()[face]
    if path is None:
        builtin = ImageFont.load_default(size)
        assert isinstance(builtin, ImageFont.FreeTypeFont)
        return builtin
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
