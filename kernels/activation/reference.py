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
    # 1 / (1 + exp(-gate)) without an exp that overflows
    y: Floats = gate * np.exp(-np.logaddexp(0, -gate)) * up
    return y


def gelu_tanh(x: Array) -> Floats:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), element by element."""
    x = np.asarray(x, np.float64)
    y: Floats = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y
