"""Samples -> training batches: the host half of the model, applied to many pictures at once.

Slicing, patches and position ids are the runtime's own. All slices of a batch are padded to one length; what the
official code would see of one prompt alone is kept by `context_lengths` (the patch count its prompt is padded to).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lensc.backends.bundle import PictureSpec
from lensc.runtime.picture import position_ids, slice_picture

from .content import CHARSET, COLOURS, SHAPES
from .draw import Drawing
from .samples import PAGE_CELLS, Sample, line, page, question

SCENE_KINDS = {"colour": 20, "count": 60, "bigger": 20}
"""How often training asks what of a scene: counting is learned last."""

IGNORED = -100
"""torch's cross entropy skips this label."""

PATCH_CLASSES = 1 + len(CHARSET) + len(SHAPES) * len(COLOURS)
"""What a patch can show: nothing, a character, a shape of a colour."""


@dataclass(frozen=True)
class Batch:
    """S slices padded to N patches, B conversations padded to T tokens."""

    task: str
    patches: npt.NDArray[np.uint8]
    """[S, N, 588]"""
    position_ids: npt.NDArray[np.int64]
    """[S, N]"""
    lengths: npt.NDArray[np.int64]
    """[S] patches of the slice itself"""
    context_lengths: npt.NDArray[np.int64]
    """[S] largest patch count among the slices of the same prompt"""
    columns: npt.NDArray[np.int64]
    """[S] patches per row"""
    classes: npt.NDArray[np.int64]
    """[S, N] what stands under each patch's centre, IGNORED on padding"""
    ids: npt.NDArray[np.int64]
    """[B, T]"""
    image_rows: npt.NDArray[np.int64]
    """[S * queries] flat positions in [B * T] that the slices' embeddings overwrite, in order"""
    targets: npt.NDArray[np.int64]
    """[B, T] next token, IGNORED outside the answer"""


@dataclass(frozen=True)
class Stage:
    """What training draws at a time: lines of up to `longest` characters, pages of up to `cells` cells, and the share of
    each task (the rest are lines)."""

    longest: int
    cells: int
    scenes: float
    pages: float
    fields: float


class Encoder:
    """Turns samples into ids with the demo tokenizer; the template is the official one."""

    def __init__(self, tokenizer: Tokenizer, query_num: int) -> None:
        self._encode: Callable[[str], list[int]] = lambda text: list(tokenizer.encode(text).ids)
        self._query_num = query_num
        self._open = tokenizer.token_to_id("<image>")

    def prompt(self, question: str, grid: tuple[int, int] | None) -> list[int]:
        image = "<image>" + "<unk>" * self._query_num + "</image>"
        block = image
        if grid is not None:
            columns, rows = grid
            block += "<slice>" + "\n".join([image * columns] * rows) + "</slice>"
        user = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        answer = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        return self._encode(user + block + "\n" + question + answer)

    def answer(self, text: str) -> list[int]:
        return self._encode(text + "<|eot_id|>")

    def image_starts(self, ids: list[int]) -> list[int]:
        return [i + 1 for i, token in enumerate(ids) if token == self._open]


def _patch_classes(
    drawing: Drawing, left: float, top: float, scale_x: float, scale_y: float, rows: int, columns: int, patch: int
) -> npt.NDArray[np.int64]:
    """The class of what stands at each patch's centre, for a slice that shows the picture scaled and shifted."""
    classes = np.zeros((rows, columns), np.int64)
    centres_x = (np.arange(columns) + 0.5) * patch
    centres_y = (np.arange(rows) + 0.5) * patch

    def paint(x0: float, y0: float, x1: float, y1: float, value: int) -> None:
        c0, c1 = np.searchsorted(centres_x, (x0 * scale_x - left, x1 * scale_x - left))
        r0, r1 = np.searchsorted(centres_y, (y0 * scale_y - top, y1 * scale_y - top))
        classes[r0:r1, c0:c1] = value

    for glyph in drawing.glyphs:
        paint(glyph.left, glyph.top, glyph.right, glyph.bottom, 1 + CHARSET.index(glyph.char))
    colours = list(COLOURS)
    for shape in drawing.shapes:
        value = 1 + len(CHARSET) + SHAPES.index(shape.kind) * len(colours) + colours.index(shape.colour)
        # At least a patch wide, so that the smallest shape has one; the corners of its square may be empty.
        half_x, half_y = (max(0.8 * shape.radius, patch / 2 / scale) for scale in (scale_x, scale_y))
        paint(shape.x - half_x, shape.y - half_y, shape.x + half_x, shape.y + half_y, value)
    return classes.reshape(-1)


def make_batch(samples: list[Sample], spec: PictureSpec, encoder: Encoder) -> Batch:
    """Slice, label and encode `samples`."""
    patch = spec.patch_size
    pixels: list[npt.NDArray[np.uint8]] = []
    columns: list[int] = []
    contexts: list[int] = []
    classes: list[npt.NDArray[np.int64]] = []
    sequences: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        cut = slice_picture(sample.image, spec)
        width, height = sample.image.size
        lengths = [(p.shape[0] // patch) * (p.shape[1] // patch) for p in cut.pixels]
        grid = cut.plan.grid
        for index, array in enumerate(cut.pixels):
            rows, cols = array.shape[0] // patch, array.shape[1] // patch
            cells = array.reshape(rows, patch, cols, patch, 3).transpose(0, 2, 4, 1, 3)
            pixels.append(np.ascontiguousarray(cells).reshape(rows * cols, -1))
            columns.append(cols)
            contexts.append(max(lengths))
            if index == 0 or grid is None:
                left = top = 0.0
                full_width, full_height = array.shape[1], array.shape[0]
            else:
                row, col = divmod(index - 1, grid[0])
                left, top = float(col * array.shape[1]), float(row * array.shape[0])
                full_width, full_height = array.shape[1] * grid[0], array.shape[0] * grid[1]
            classes.append(
                _patch_classes(sample.drawing, left, top, full_width / width, full_height / height, rows, cols, patch)
            )
        sequences.append((encoder.prompt(sample.question, grid), encoder.answer(sample.answer)))

    longest = max(len(p) for p in pixels)
    count = len(pixels)
    patches = np.full((count, longest, pixels[0].shape[1]), 128, np.uint8)
    ids_by_slice = np.zeros((count, longest), np.int64)
    labels = np.full((count, longest), IGNORED, np.int64)
    for i, array in enumerate(pixels):
        patches[i, : len(array)] = array
        labels[i, : len(array)] = classes[i]
        ids_by_slice[i, : contexts[i]] = position_ids(contexts[i], spec.pos_grid)

    width = max(len(p) + len(a) for p, a in sequences)
    ids = np.zeros((len(samples), width), np.int64)
    targets = np.full((len(samples), width), IGNORED, np.int64)
    image_rows: list[npt.NDArray[np.int64]] = []
    for i, (prompt, answer) in enumerate(sequences):
        ids[i, : len(prompt) + len(answer)] = prompt + answer
        targets[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = answer
        image_rows += [i * width + s + np.arange(spec.query_num) for s in encoder.image_starts(prompt)]
    return Batch(
        task=samples[0].task,
        patches=patches,
        position_ids=ids_by_slice,
        lengths=np.array([len(p) for p in pixels]),
        context_lengths=np.array(contexts),
        columns=np.array(columns),
        classes=labels,
        ids=ids,
        image_rows=np.concatenate(image_rows),
        targets=targets,
    )


def draw_samples(rng: Random, stage: Stage, slices: int) -> list[Sample]:
    """Training samples of one task, about `slices` slices of them, of like length so that little is padding."""
    choice = rng.random()
    if choice < stage.scenes:
        kinds = rng.choices(list(SCENE_KINDS), list(SCENE_KINDS.values()), k=slices)
        return [question(rng, False, kind) for kind in kinds]
    if choice < stage.scenes + stage.pages:
        sizes = {cells: weight for cells, weight in PAGE_CELLS.items() if cells <= stage.cells}
        cells = rng.choices(list(sizes), list(sizes.values()))[0]
        return [page(rng, False, cells) for _ in range(max(2, slices // (cells + 1)))]
    if choice < stage.scenes + stage.pages + stage.fields:
        return [question(rng, False, "field") for _ in range(slices // 4)]
    if stage.pages and rng.random() < 0.1:
        return [line(rng, False, 4, stage.longest, rng.choice((2, 3))) for _ in range(slices // 4)]
    return [line(rng, False, 2 if stage.longest < 16 else 4, stage.longest) for _ in range(slices)]
