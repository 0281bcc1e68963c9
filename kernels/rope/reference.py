"""Rotary position embedding as its formula, and the types of a KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def rope_table(positions: Array, inverse_frequencies: Array) -> tuple[Floats, Floats]:
    """cos and sin of the angles, each float64[tokens, dim / 2].

    positions: int64[tokens]; inverse_frequencies: float32[dim / 2]. The angle is a product in float32, as the portable
    graph takes it: at position 8000 its rounding turns by up to 2.4e-4.
    """
    angles = np.asarray(positions, np.float32)[:, None] * np.asarray(inverse_frequencies, np.float32)[None]
    return np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)


def rope(x: Array, cos: Array, sin: Array) -> Floats:
    """x · cos + rotate_half(x) · sin, where rotate_half([a, b]) = [-b, a].

    x: float[tokens, heads, dim]; cos, sin: float[tokens, dim / 2]. Returns float64[tokens, heads, dim].
    """
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    c, s = np.asarray(cos, np.float64)[:, None], np.asarray(sin, np.float64)[:, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def quantize_rows(x: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """The int8 rows of a cache, symmetric: x = integer · scale with scale = max |x| / 127.

    x: float[..., dim]. Returns int8[..., dim] and scales float32[...]; rows whose scale would be below the smallest
    normal float32 are zeros with scale 0.
    """
    scales = (np.abs(x).max(-1) / 127).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 0
    divisor = np.where(scales == 0, 1, scales)[..., None]
    integers = np.where(scales[..., None] == 0, 0, np.rint(np.asarray(x, np.float64) / divisor))
    return integers.astype(np.int8), scales
