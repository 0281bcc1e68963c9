"""RMSNorm and LayerNorm as their formulas, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Floats:
    """x / sqrt(mean(x^2) + epsilon) * weight along each row.

    x: float[rows, width]; weight: float[width]. Returns float64[rows, width].
    """
    x = np.asarray(x, np.float64)
    y: Floats = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight
    return y


def layer_norm(x: Array, weight: Array, bias: Array | None, epsilon: float) -> Floats:
    """(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias along each row.

    x: float[rows, width]; weight, bias: float[width]. Returns float64[rows, width].
    """
    x = np.asarray(x, np.float64)
    centered = x - x.mean(-1, keepdims=True)
    y: Floats = centered / np.sqrt((centered * centered).mean(-1, keepdims=True) + epsilon) * weight
    return y if bias is None else y + bias
