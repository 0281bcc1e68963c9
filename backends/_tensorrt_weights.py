"""Weights of a portable graph as TensorRT's strongly typed networks take them.

    float                          float16 or bfloat16, converted when they are written
    at most 4 bits in groups       INT4 [inputs, outputs] in blocks along the inputs, the form that NVIDIA's own tools export
    int8, a scale per output       INT8 weights and inputs, whose one scale is measured (QuantizeLinear, DequantizeLinear)
    all others                     become floats, and the manifest says which

TensorRT's INT4 has values from -8 to 7, no zero point and positive scales, while a portable weight's scale may be negative.
For a group with a negative scale s, -value stands with |s|. Where that would be 8, ~value = -value - 1 stands there for the
whole group, and |s| times the sum of the group's inputs is added: exactly the same product, by a second, small one.

Everything is made when it is written, a weight at a time: those of a full-size decoder take 7 GB unpacked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._portable import QuantizedLinear
from .base import Array
from .errors import GraphError

PIECE = 1024
"""Outputs of a weight that are made floats at once: a head has 128,256."""

LOWEST, HIGHEST = -8, 7
BITS = 4


def fits_int4(found: QuantizedLinear) -> bool:
    """Whether TensorRT can hold it in 4 bits: its blocks are whole, its rows end with whole bytes."""
    return found.bits <= BITS and found.block > 0 and found.inputs % found.block == 0 and found.outputs % 2 == 0


def is_int8(found: QuantizedLinear) -> bool:
    """Whether it is a weight for products of int8."""
    return found.turned and found.bits == 8


def int4_of(found: QuantizedLinear) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    """Of a weight that `fits_int4`: values int8[outputs, groups, block] from -8 to 7, which go with |scale|, and
    bool[outputs, groups]: where |scale| is to be added to every weight of the group.

    Raises GraphError for zero points with which values leave the range of 4 bits.
    """
    signed = numpy_of(found.values).astype(np.int8).reshape(found.outputs, -1, found.block)
    if found.zero_point is not None:
        signed = signed - numpy_of(found.zero_point).astype(np.int8).reshape(found.outputs, -1, 1)
    if signed.min() < LOWEST or signed.max() > HIGHEST:
        raise GraphError(
            f"weight {found.values.name}: zero points have no form in TensorRT, which takes symmetric weights: a scheme "
            "without -asym"
        )
    negative = numpy_of(found.scale) < 0
    raised = negative & (signed.min(-1) == LOWEST)
    np.negative(signed, out=signed, where=(negative & ~raised)[:, :, None])
    np.invert(signed, out=signed, where=raised[:, :, None])
    return signed, raised


def int4_values(found: QuantizedLinear) -> npt.NDArray[np.int8]:
    """int8[inputs, outputs] from -8 to 7"""
    return np.ascontiguousarray(int4_of(found)[0].reshape(found.outputs, found.inputs).T)


def int4_scales(found: QuantizedLinear) -> npt.NDArray[np.float32]:
    """float32[groups, outputs], above 0"""
    return np.ascontiguousarray(np.abs(numpy_of(found.scale).astype(np.float32)).T)


def int4_offsets(found: QuantizedLinear) -> npt.NDArray[np.float32]:
    """float32[groups, outputs]: what is added to every weight of a group"""
    return np.where(int4_of(found)[1].T, int4_scales(found), np.float32(0))


def as_float(found: QuantizedLinear) -> npt.NDArray[np.float32]:
    """The weight that a quantized linear stands for, float32[inputs, outputs], made `PIECE` outputs at a time."""
    values, scale = numpy_of(found.values), numpy_of(found.scale).astype(np.float32)
    zeros = None if found.zero_point is None else numpy_of(found.zero_point).reshape(found.outputs, -1)
    weight = np.empty((found.inputs, found.outputs), np.float32)
    block = found.block or found.inputs

    def spread(part: Array) -> Array:
        return np.repeat(part, block, axis=1)[:, : found.inputs].astype(np.float32)

    for start in range(0, found.outputs, PIECE):
        some = slice(start, start + PIECE)
        if found.turned:
            weight[:, some] = values[:, some].astype(np.float32) * scale[some]
            continue
        piece = values[some].astype(np.float32)
        if zeros is not None:
            piece -= spread(zeros[some])
        weight[:, some] = (piece * spread(scale.reshape(found.outputs, -1)[some])).T
    return weight


def numpy_of(value: Any) -> Array:
    """The values of an initializer; of fewer than 8 bits, one to a byte."""
    return np.asarray(value.const_value.numpy())


def converted(array: Array, dtype: Any, name: str) -> Array:
    """`array: float32` in the numpy type `dtype`. Raises GraphError for a value that it cannot hold."""
    with np.errstate(over="ignore"):  # it is looked for below
        made = array.astype(dtype)
    if not np.isfinite(made.astype(np.float32)).all():
        raise GraphError(f"weight {name}: holds values that {np.dtype(dtype).name} does not; use -bf16 in the target")
    return made
