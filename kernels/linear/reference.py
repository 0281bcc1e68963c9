"""y = x W^T + bias + residual as its formula, in float64, for weights of floats and of few-bit integers.

A quantized weight stands for `(values - zero_points) * scales`, where `group` neighbouring inputs share a scale and a zero
point; the last group of a row may be shorter, and group 0 is all inputs. Inputs that are rounded to 8 bits are so per row
and unit: a group of the weight or a part of one, or several groups where the scales are whole multiples of a step. In kernels
the sum over a unit is then one of integers, which is exact, times two scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

LARGEST = 127
"""Of an int8 that has its negative, too."""


def linear(x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None) -> Floats:
    """x W^T + bias + residual.

    x: float[rows, inputs]; weight: float[outputs, inputs]; bias: float[outputs]; residual: float[rows, outputs]. Returns
    float64[rows, outputs].
    """
    return _ended(np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, bias, residual)


def quantized_linear(
    x: Array,
    values: Array,
    scales: Array,
    zero_points: Array | None,
    group: int,
    unit: int | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
) -> Floats:
    """x W^T + bias + residual with W = (values - zero_points) * scales.

    x: float[rows, inputs]; values: int8 or uint8[outputs, inputs], one to a byte; scales: float32[outputs, groups];
    zero_points: uint8[outputs, groups], None for 0. `unit`: the inputs that are rounded together by `quantize_rows`; None:
    they are not rounded. Returns float64[rows, outputs].
    """
    if unit is None:
        return linear(x, dequantize(values, scales, zero_points, group), bias, residual)
    rounded, steps = quantize_rows(x, unit)
    weight = dequantize(values, scales, zero_points, group)
    y = np.zeros((len(x), len(values)))
    for u, columns in enumerate(_groups(values.shape[1], unit)):
        sums = rounded[:, columns].astype(np.float64) @ weight[:, columns].T
        y += sums * steps[:, u, None].astype(np.float64)
    return _ended(y, bias, residual)


def quantize_rows(x: Array, group: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round each group of each row to 8 bits, symmetric: scale = max|x| / 127, values to nearest, ties to even.

    x: float32[rows, inputs]. Returns values: int8[rows, inputs] and scales: float32[rows, groups], both computed in
    float32; of a group of zeros both are 0.
    """
    x = np.asarray(x, np.float32)
    columns = _groups(x.shape[1], group)
    scales = np.stack([np.abs(x[:, c]).max(-1, initial=0) / np.float32(LARGEST) for c in columns], -1)
    values = np.zeros(x.shape, np.int8)
    for g, c in enumerate(columns):
        # a scale may be 0 where the inputs are not: denormals
        scale = scales[:, g, None]
        quotients = np.divide(x[:, c], scale, where=scale > 0, out=np.zeros_like(x[:, c]))
        values[:, c] = np.clip(np.rint(quotients), -LARGEST, LARGEST)
    return values, scales


def dequantize(values: Array, scales: Array, zero_points: Array | None, group: int) -> Floats:
    """(values - zero_points) * scales: float64[outputs, inputs]. Arguments as in `quantized_linear`."""
    inputs = values.shape[1]
    signed = values.astype(np.float64)
    if zero_points is not None:
        signed -= _spread(zero_points, group, inputs)
    weight: Floats = signed * _spread(scales, group, inputs)
    return weight


def unpack(packed: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` values of `bits` bits in `packed: uint8[...]`, one to a byte; the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values: npt.NDArray[np.uint8] = (packed.reshape(-1, 1) >> shifts & np.uint8(2**bits - 1)).reshape(-1)[:count]
    return values


def _ended(y: Floats, bias: Array | None, residual: Array | None) -> Floats:
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def _groups(inputs: int, group: int) -> list[slice]:
    step = group or max(inputs, 1)
    return [slice(start, min(start + step, inputs)) for start in range(0, inputs, step)]


def _spread(per_group: Array, group: int, inputs: int) -> Array:
    """[rows, groups] -> [rows, inputs]."""
    return np.repeat(per_group, group or inputs, axis=1)[:, :inputs]
