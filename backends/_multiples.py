"""Whether the scales of each row of a weight are whole multiples of one step, and which.

Where they are, a kernel sums inputs of several groups in integers: (value - zero point) * multiple fits in an int8.
"""

from __future__ import annotations

import numpy as np

from .base import Array

LARGEST = 15
"""Of the multiples' magnitudes: the values -8 to 7 of a symmetric weight of 4 bits, times 15, are -120 to 105."""

CLOSE = 1e-6
"""Share of a row's largest scale by which each may differ from its multiple. That products are rounded to float32 makes up
an eighth of it; neighbouring multiples are at least a fifteenth apart.
"""

PIECE = 1 << 17
"""Scales that are looked at at once: temporaries of a MiB."""


def multiples(scales: Array) -> tuple[Array, Array] | None:
    """The multiples int8[out, groups], of magnitude 1 to `LARGEST`, and the steps float32[out], positive, of which they make
    `scales: float32[out, groups]`; None unless all rows are so.

    Of several steps that do, it is the smallest. Works in pieces of `PIECE` scales, and ends with the first piece that has
    another row.
    """
    outputs, groups = scales.shape
    found = np.empty((outputs, groups), np.int8)
    steps = np.empty(outputs, np.float32)
    rows = max(1, PIECE // groups)
    for start in range(0, outputs, rows):
        piece = scales[start : start + rows].astype(np.float64)
        largest = np.abs(piece).max(axis=1)
        if not (np.isfinite(largest) & (largest > 0)).all():
            return None
        # of rows in units of their largest scale, those that no step was found for yet
        unit, left = piece / largest[:, None], np.arange(len(piece))
        for most in range(LARGEST, 0, -1):
            exact = unit * most
            nearest = np.rint(exact)
            fits = ((np.abs(exact - nearest) <= CLOSE * most) & (nearest != 0)).all(axis=1)
            found[start + left[fits]] = nearest[fits]
            steps[start + left[fits]] = largest[left[fits]] / most
            unit, left = unit[~fits], left[~fits]
            if left.size == 0:
                break
        else:
            return None
    return found, steps


def scales_of(steps: Array, multiples: Array) -> Array:
    """float64[out, groups]: the scales that steps, float32[out], and their multiples, int8[out, groups], make."""
    scales: Array = steps[:, None].astype(np.float64) * multiples
    return scales
