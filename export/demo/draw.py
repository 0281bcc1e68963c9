"""Content -> picture, and where each character stands (for the auxiliary loss).

A picture's area decides how the official slicing treats it: up to `scale_resolution`² pixels it is one slice, above it
is cut into up to 9 cells. Sizes are chosen here by area, so that after slicing a character is at least one patch wide
and about two and a half patches high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .content import COLOURS, SHAPES, Page
from .fonts import FACES, font

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Glyph:
    """A character and its cell in pixels: advance width, ascender to descender."""

    char: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Shape:
    """A shape of a scene, in pixels: `radius` is half the side of the square it fills."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Drawing:
    """A picture and where its content stands."""

    image: Image.Image
    glyphs: tuple[Glyph, ...] = ()
    shapes: tuple[Shape, ...] = ()


def _contrast(a: RGB, b: RGB) -> float:
    weights = (0.299, 0.587, 0.114)
    return abs(sum(w * (x - y) for w, x, y in zip(weights, a, b, strict=True)))


def ink_and_paper(rng: Random) -> tuple[RGB, RGB]:
    """Two colours at least 90 of 255 apart in brightness; black on white most often."""
    if rng.random() < 0.3:
        dark, light = rng.randrange(60), rng.randrange(215, 256)
        return (dark, dark, dark), (light, light, light)
    while True:
        ink = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        paper = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if _contrast(ink, paper) >= 90:
            return ink, paper


def _weathered(rng: Random, image: Image.Image) -> Image.Image:
    """Now and then noise or JPEG artefacts, as in pictures from elsewhere."""
    kind = rng.random()
    if kind < 0.15:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), (image.height, image.width, 1))
        return Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))
    if kind < 0.25:
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=rng.randrange(60, 95))
        return Image.open(buffer).convert("RGB")
    return image


def draw_page(rng: Random, page: Page, area: float) -> Drawing:
    """Set `page` in one face on a picture of about `area` square pixels."""
    face = rng.randrange(len(FACES))
    reference = font(face, 40)
    ascent, descent = reference.getmetrics()
    leading = rng.uniform(1.0, 1.3)
    margin_x, margin_y = rng.uniform(4, 36), rng.uniform(2, 20)
    gap = 20.0
    width = max(sum(map(reference.getlength, parts)) + gap * (len(parts) - 1) for parts in page.lines)
    height = (ascent + descent) * (1 + leading * (len(page.lines) - 1))
    scale = math.sqrt(area / ((width + 2 * margin_x) * (height + 2 * margin_y)))
    size = max(8, int(40 * scale))
    scale = size / 40
    actual = font(face, size)
    ascent, descent = actual.getmetrics()
    line_height = (ascent + descent) * leading
    inner = max(sum(map(actual.getlength, parts)) + gap * scale * (len(parts) - 1) for parts in page.lines)
    picture_width = math.ceil(inner + 2 * margin_x * scale)
    picture_height = math.ceil((ascent + descent) + line_height * (len(page.lines) - 1) + 2 * margin_y * scale)

    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (picture_width, picture_height), paper)
    canvas = ImageDraw.Draw(image)
    align = rng.choice(("left", "left", "left", "centre"))
    glyphs: list[Glyph] = []
    top = margin_y * scale
    for parts in page.lines:
        for index, text in enumerate(parts):
            length = actual.getlength(text)
            left = margin_x * scale
            if index > 0:
                left = picture_width - margin_x * scale - length
            elif align == "centre" and len(parts) == 1:
                left = (picture_width - length) / 2
            canvas.text((left, top), text, ink, actual)
            starts = [left + actual.getlength(text[:i]) for i in range(len(text) + 1)]
            glyphs += [
                Glyph(char, starts[i], top, starts[i + 1], top + ascent + descent)
                for i, char in enumerate(text)
                if char != " "
            ]
        top += line_height
    return Drawing(_weathered(rng, image), tuple(glyphs))


def _outline(shape: Shape) -> list[tuple[float, float]]:
    x, y, r = shape.x, shape.y, shape.radius
    if shape.kind == "square":
        corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif shape.kind == "triangle":
        corners = [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    else:
        turns = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
        lengths = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        corners = [(n * math.cos(a), n * math.sin(a)) for n, a in zip(lengths, turns, strict=True)]
    return [(x + r * cx, y + r * cy) for cx, cy in corners]


def draw_scene(rng: Random, wanted: list[tuple[str, str, float]], area: float) -> Drawing | None:
    """Place shapes (kind, colour, radius as a fraction of the shorter side) without overlap; None if they do not fit."""
    aspect = math.exp(rng.uniform(-0.5, 0.5))
    height = round(math.sqrt(area / aspect))
    width = round(height * aspect)
    unit = min(width, height)
    placed: list[Shape] = []
    for kind, colour, radius in wanted:
        for _ in range(60):
            r = radius * unit
            if 2 * r + 2 > unit:
                return None
            x, y = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            if all(max(abs(x - p.x), abs(y - p.y)) > r + p.radius + 3 for p in placed):
                placed.append(Shape(kind, colour, x, y, r))
                break
        else:
            return None
    used = {COLOURS[s.colour] for s in placed}
    while True:
        level = rng.choice((0, 255, rng.randrange(256)))
        tint = tuple(min(255, max(0, level + rng.randrange(-25, 26))) for _ in range(3))
        paper = (tint[0], tint[1], tint[2])
        if all(sum(abs(a - b) for a, b in zip(paper, colour, strict=True)) > 150 for colour in used):
            break
    factor = 4
    image = Image.new("RGB", (width * factor, height * factor), paper)
    canvas = ImageDraw.Draw(image)
    for shape in placed:
        r = shape.radius
        fill = tuple(min(255, max(0, c + rng.randrange(-12, 13))) for c in COLOURS[shape.colour])
        if shape.kind == "circle":
            box = (shape.x - r, shape.y - r, shape.x + r, shape.y + r)
            canvas.ellipse([c * factor for c in box], fill=fill)
        else:
            canvas.polygon([(x * factor, y * factor) for x, y in _outline(shape)], fill=fill)
    assert {s.kind for s in placed} <= set(SHAPES)
    return Drawing(_weathered(rng, image.resize((width, height), Image.Resampling.BOX)), shapes=tuple(placed))
