"""From a picture to what the vision graph eats: slices, patches, position ids, resampler position embeddings.

Everything that depends on a picture's size is computed here, on the host, so that the graph holds nothing
data-dependent. The arithmetic follows the official preprocessing to the bit (sizes in float64, pixels in 8 bits with
Pillow's antialiased bicubic, values in float32); `picture_source` says what happens to alpha, EXIF, 16 bits and so on.

    picture = open_picture("receipt.png")
    slices = slice_picture(picture, spec)             # overview first, then the cells row by row
    batches = vision_feeds(slices.pixels, spec, hidden_size)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lensc.backends.bundle import PictureSpec
from lensc.backends.errors import PictureError, UsageError

from .picture_source import MAX_PIXELS, PictureSource, RGBPicture, check_size, open_picture

__all__ = [
    "MASK",
    "MAX_PATCHES",
    "MAX_PIXELS",
    "PictureSlices",
    "PictureSource",
    "RGBPicture",
    "SlicePlan",
    "VisionBatch",
    "open_picture",
    "patchify",
    "plan_slices",
    "position_ids",
    "resampler_pos_embed",
    "slice_picture",
    "vision_feeds",
]

MAX_PATCHES = 2048
"""Most patches in one slice: twice what the training used (about 1,024). Work and memory of attention grow with the
square: at 2,048 the logits of 16 heads take 256 MiB per slice, at the 17,527 of a 1x300000 picture 18 GiB. With the
official scale of 448 pixels it admits every aspect ratio up to 4000:1."""

MASK = -1e4
"""Added to the attention logit of a key that must not be seen: exp() of it is 0 in float32, and float16 can hold it."""

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]


@dataclass(frozen=True)
class SlicePlan:
    """How one picture is cut. Sizes are (width, height) in pixels, multiples of the patch size."""

    source: Size
    grid: tuple[int, int] | None
    """(columns, rows) of the cells, None if the picture is not cut."""
    overview: Size
    refine: Size | None
    """Size of the whole picture before it is cut into cells."""
    cell: Size | None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Size of each slice in order: overview, then the cells row by row."""
        if self.grid is None or self.cell is None:
            return (self.overview,)
        return (self.overview,) + (self.cell,) * (self.grid[0] * self.grid[1])

    def patches(self, patch_size: int) -> tuple[int, ...]:
        """How many patches each slice has, of patches of `patch_size` pixels a side."""
        return tuple((width // patch_size) * (height // patch_size) for width, height in self.sizes)


@dataclass(frozen=True, eq=False)
class PictureSlices:
    """A picture cut up. `pixels[i]: uint8[height, width, 3]` are RGB and may be views of one array."""

    pixels: list[Pixels]
    plan: SlicePlan
    notes: tuple[str, ...]
    """What was done to the picture, in short: what was ignored or dropped, the sizes it was brought to."""


@dataclass(frozen=True, eq=False)
class VisionBatch:
    """One call of the vision graph: `feeds` by input name, `grids[i]` = (rows, columns) of patches of slice i."""

    feeds: dict[str, npt.NDArray[Any]]
    grids: tuple[tuple[int, int], ...]


def plan_slices(width: int, height: int, spec: PictureSpec, name: str = "picture") -> SlicePlan:
    """Plan how a picture of `width` x `height` pixels is cut.

    Raises PictureError, with `name` in front, if the picture is too large, or so thin that a slice would have more
    than MAX_PATCHES patches or the picture would be squeezed into no height at all.
    """
    check_size(width, height, name)
    grid = _choose_grid(width, height, spec)
    refine = cell = None
    try:
        if grid is None:
            overview = _fit(width, height, True, spec)
        else:
            overview = _fit(width, height, False, spec)
            cols, rows = grid
            cell = _fit(_snap(width, cols) / cols, _snap(height, rows) / rows, True, spec)
            refine = (cell[0] * cols, cell[1] * rows)
        for size in (overview, cell or overview):
            patches = (size[0] // spec.patch_size) * (size[1] // spec.patch_size)
            if patches > MAX_PATCHES:
                shape = f"{size[0]}x{size[1]}"
                raise PictureError(f"a {shape} slice would have {patches} patches, the limit is {MAX_PATCHES}")
    except PictureError as error:
        raise PictureError(f"{name}: {width}x{height} is too thin ({error}); crop it to a less extreme shape") from None
    return SlicePlan((width, height), grid, overview, refine, cell)


def slice_picture(source: PictureSource | RGBPicture, spec: PictureSpec) -> PictureSlices:
    """Open `source` if need be, resize it and cut it: the overview first, then the cells row by row.

    Cells are cut from the original picture resized once, not from the overview. Raises PictureError.
    """
    picture = open_picture(source)
    plan = plan_slices(*picture.size, spec, picture.name)
    pixels = [_resize(picture.image, plan.overview)]
    notes = [*picture.notes, "{}x{} resized to {}x{}".format(*plan.source, *plan.overview)]
    if plan.grid is not None and plan.refine is not None and plan.cell is not None:
        (cols, rows), (width, height) = plan.grid, plan.cell
        refined = _resize(picture.image, plan.refine)
        for y in range(0, rows * height, height):
            pixels += [refined[y : y + height, x : x + width] for x in range(0, cols * width, width)]
        notes.append("and to {}x{}, cut into {} columns x {} rows".format(*plan.refine, cols, rows))
    return PictureSlices(pixels, plan, tuple(notes))


def vision_feeds(slices: Sequence[Pixels], spec: PictureSpec, hidden_size: int) -> list[VisionBatch]:
    """Make the feeds of the vision graph for all slices of a call, of all its pictures, in order.

    `slices[i]: uint8[height, width, 3]`, sides multiples of the patch size. `hidden_size` is the decoder's width.
    Feeds, with `patches` the most patches of any slice in the batch (shorter slices are padded at the end with zeros):

    - `patches: float32[slices, patches, 3 * patch_size**2]`, normalized, order channel, row, column;
    - `position_ids: int64[slices, patches]`;
    - `attention_bias: float32[slices, patches]`, 0 or MASK, for the keys of the vision tower;
    - `key_bias: float32[slices, patches]`, 0 or MASK, for the keys of the resampler;
    - `key_pos_embed: float32[slices, patches, hidden_size]`, 0 on padding.

    `spec.vision_padding` decides what padding does. "official": one batch; the tower sees the padding, and ids come
    from the padded length, so a slice's features depend on what it is batched with. "masked": one batch; each slice has
    ids from its own length (0 on padding) and padding is masked. "per_slice": one batch for each slice, no padding.
    """
    for i, pixels in enumerate(slices):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise UsageError(f"slice {i}: {pixels.dtype}{list(pixels.shape)}; expected uint8[height, width, 3]")
        height, width = pixels.shape[:2]
        if height % spec.patch_size or width % spec.patch_size:
            raise UsageError(f"slice {i}: {width}x{height}; expected multiples of {spec.patch_size} pixels")
    if spec.vision_padding == "per_slice":
        return [_batch([pixels], spec, hidden_size) for pixels in slices]
    return [_batch(slices, spec, hidden_size)] if slices else []


def patchify(pixels: Pixels, spec: PictureSpec, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """Cut a slice into normalized patches: float32[rows * columns, 3 * patch_size**2], row-major, channel first.

    `out`, if given, is filled and returned; it must be C-contiguous.
    """
    p = spec.patch_size
    rows, cols = pixels.shape[0] // p, pixels.shape[1] // p
    if out is None:
        out = np.empty((rows * cols, 3 * p * p), np.float32)
    out.reshape(rows, cols, 3, p, p)[...] = pixels.reshape(rows, p, cols, p, 3).transpose(0, 2, 4, 1, 3)
    out /= np.float32(255)
    out -= np.repeat(np.asarray(spec.mean, np.float32), p * p)
    out /= np.repeat(np.asarray(spec.std, np.float32), p * p)
    return out


@lru_cache(maxsize=64)
def position_ids(patches: int, grid: int = 70) -> npt.NDArray[np.int64]:
    """Rows of the vision tower's position table for a strip of `patches` patches: int64[patches], read-only.

    In exact arithmetic floor(grid * i / patches). The official code compares float32 coordinates, where i / patches on
    the boundary of a bucket may fall one lower; the same roundings are made here.
    """
    step = np.float32(1) / np.float32(patches)
    coordinates = _arange(0.0, float(step), patches)
    boundaries = _arange(1 / grid, 1 / grid, grid - 1)
    ids = np.searchsorted(boundaries, coordinates, side="right").astype(np.int64)
    ids.setflags(write=False)
    return ids


def _arange(start: float, step: float, count: int) -> npt.NDArray[np.float32]:
    """start + i * step as torch.arange computes it in float32 on a CPU, bit for bit.

    It works in float64, but rounds the first value of every 8 to float32 before adding to it. The last count % 16 values
    lie outside its vector loop and have no such rounding.
    """
    i = np.arange(count)
    vector = count - count % 16
    base = (start + step * (i[:vector] & ~7)).astype(np.float32)
    values = (start + step * i).astype(np.float32)
    values[:vector] = base + step * (i[:vector] & 7)
    return values


def resampler_pos_embed(rows: int, cols: int, hidden_size: int) -> npt.NDArray[np.float32]:
    """Make the resampler's sin-cos position embedding: float32[rows * cols, hidden_size], row-major.

    The first half of a vector encodes the column, the second half the row.
    """
    out = np.empty((rows, cols, hidden_size), np.float32)
    half = hidden_size // 2
    out[:, :, :half] = _sincos(cols, half)
    out[:, :, half:] = _sincos(rows, half)[:, None]
    return out.reshape(rows * cols, hidden_size)


def _sincos(positions: int, width: int) -> npt.NDArray[np.float32]:
    quarter = width // 2
    omega = np.float32(1) / np.float32(10000) ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angles = np.arange(positions, dtype=np.float32)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _batch(slices: Sequence[Pixels], spec: PictureSpec, hidden_size: int) -> VisionBatch:
    grids = tuple((pixels.shape[0] // spec.patch_size, pixels.shape[1] // spec.patch_size) for pixels in slices)
    count, longest = len(slices), max(rows * cols for rows, cols in grids)
    patches = np.zeros((count, longest, 3 * spec.patch_size**2), np.float32)
    ids = np.zeros((count, longest), np.int64)
    attention_bias = np.zeros((count, longest), np.float32)
    key_bias = np.zeros((count, longest), np.float32)
    key_pos_embed = np.zeros((count, longest, hidden_size), np.float32)
    made: dict[tuple[int, int], int] = {}
    for i, (pixels, grid) in enumerate(zip(slices, grids, strict=True)):
        own = grid[0] * grid[1]
        patchify(pixels, spec, patches[i, :own])
        key_bias[i, own:] = MASK
        first = made.setdefault(grid, i)  # cells share one size: compute its embedding once
        key_pos_embed[i, :own] = key_pos_embed[first, :own] if first < i else resampler_pos_embed(*grid, hidden_size)
        if spec.vision_padding == "masked":
            ids[i, :own] = position_ids(own, spec.pos_grid)
            attention_bias[i, own:] = MASK
        else:
            ids[i] = position_ids(longest, spec.pos_grid)
    feeds: dict[str, npt.NDArray[Any]] = {
        "patches": patches,
        "position_ids": ids,
        "attention_bias": attention_bias,
        "key_bias": key_bias,
        "key_pos_embed": key_pos_embed,
    }
    return VisionBatch(feeds, grids)


def _snap(length: float, unit: int) -> int:
    """The multiple of `unit` nearest to `length` (halves to even), at least one unit."""
    return max(unit, unit * round(length / unit))


def _fit(width: float, height: float, upscale: bool, spec: PictureSpec) -> Size:
    """The size of about scale_resolution**2 pixels with this aspect, sides multiples of the patch size."""
    scale = spec.scale_resolution
    if upscale or width * height > scale * scale:
        aspect = width / height
        height = int(scale / math.sqrt(aspect))
        width = int(height * aspect)  # from the truncated height, as officially
        if height == 0:
            raise PictureError("its height would be scaled to 0")
    return _snap(width, spec.patch_size), _snap(height, spec.patch_size)


def _choose_grid(width: int, height: int, spec: PictureSpec) -> tuple[int, int] | None:
    """(columns, rows) of the aspect nearest to the picture's in the logarithm, the first of equals; None: do not cut."""
    most = spec.max_slice_nums
    ideal = min(math.ceil(width * height / (spec.scale_resolution * spec.scale_resolution)), most)
    if ideal <= 1:
        return None
    aspect = math.log(width / height)
    candidates = [
        (cols, n // cols)
        for n in (ideal - 1, ideal, ideal + 1)
        if 1 < n <= most
        for cols in range(1, n + 1)
        if n % cols == 0
    ]
    return min(candidates, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))


def _resize(image: Image.Image, size: Size) -> Pixels:
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
