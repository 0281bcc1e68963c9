"""SiLU and GELU as their formulas, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def silu_mul(gate: Array, up: Array) -> Floats:
    """gate * sigmoid(gate) * up, element by element."""
    gate = np.asarray(gate, np.float64)
    # tanh has no intermediate that overflows
    sigmoid = (1 + np.tanh(gate / 2)) / 2
    y: Floats = gate * sigmoid * up
    return y


def gelu_tanh(x: Array) -> Floats:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), element by element."""
    x = np.asarray(x, np.float64)
    y: Floats = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y
