"""What a model is asked when its graphs are verified: pictures of several shapes, and a question without one."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from lensc.backends.bundle import ModelSpec
from lensc.runtime.picture import PictureSource

from . import demo
from .verify import Question

SHIPPED = 3
"""Of the shipped pictures, so many are used: each is answered three times, once by the slow reference."""

TEXT = "LENSC 2048\nTotal 17.35 EUR\n10 x 4 = 40"


def questions_for(spec: ModelSpec) -> tuple[Question, ...]:
    """Questions that fit the model: one slice, a cut picture, the first shipped pictures, and text alone."""
    side = spec.picture.scale_resolution
    drawn = [_draw(side, side), _draw(2 * side, side)]
    pictures: list[PictureSource] = [*drawn, *sorted(demo.PICTURES.glob("*.png"))[:SHIPPED]]
    return (*(Question("Read the text.", (picture,)) for picture in pictures), Question("What can you see?"))


def _draw(width: int, height: int) -> Image.Image:
    """Text, a box and a disc on a coloured ground."""
    picture = Image.new("RGB", (width, height), (236, 232, 220))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 2, height // 2, width - 8, height - 8), fill=(30, 110, 190))
    draw.rectangle((8, height // 2, width // 3, height - 8), fill=(190, 40, 40), outline=(0, 0, 0))
    draw.multiline_text((8, 8), TEXT, fill=(20, 20, 20), font=ImageFont.load_default(height / 9))
    return picture
