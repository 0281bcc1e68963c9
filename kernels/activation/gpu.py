"""SiLU and GELU on a GPU. Both are a product with a sigmoid: x/2 * (1 + tanh(u)) = x * sigmoid(2u)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

jit: Callable[[Any], Any] = triton.jit

_BLOCK = 1024
_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate * sigmoid(gate) * up.

    gate_up: float[rows, 2 * width], contiguous, gates first. Returns [rows, width] in its dtype, or `out`.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    _silu_mul[(rows, triton.cdiv(width, _BLOCK))](gate_up, y, width, BLOCK=_BLOCK, num_warps=4)
    return y


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU of x + bias by the formula with tanh.

    x: float[rows, width], contiguous; bias: float32[width]. Returns [rows, width] in the dtype of x.
    """
    rows, width = x.shape
    y = torch.empty_like(x)
    _gelu_tanh[(rows, triton.cdiv(width, _BLOCK))](x, bias, y, width, BLOCK=_BLOCK, num_warps=4)
    return y


@jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)) by an exp that never exceeds 1."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1 + small)


@jit
def _silu_mul(gate_up, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * width + column, (gate * _sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@jit
def _gelu_tanh(x, bias, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    gate = _sigmoid(_SLOPE * (value + 0.044715 * value * value * value))
    tl.store(y + at, (value * gate).to(y.dtype.element_ty), mask=inside)
