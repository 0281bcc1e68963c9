"""RMSNorm and LayerNorm on a GPU, with the sum that makes a residual stream before them: a row is read once and stays in
registers for its statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import triton
import triton.language as tl

jit: Callable[[Any], Any] = triton.jit


def add_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    epsilon: float,
    kind: Literal["rms", "layer"],
    dtype: torch.dtype,
    out_residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the residual stream and normalize it: stream = residual + x + bias.

    x, residual: float[rows, width], contiguous, one of them may be None; bias, weight, norm_bias: float32[width];
    out_residual: float32[rows, width] to write the stream to, which may be `residual` itself.
    Returns the stream, float32[rows, width], and its norm, dtype[rows, width]. Where nothing is added and no
    `out_residual` given, the stream is the one argument as it came.
    """
    given = residual if x is None else x
    if given is None:
        raise ValueError("nothing to normalize: x and residual are both None")
    rows, width = given.shape
    normalized = torch.empty((rows, width), dtype=dtype, device=given.device)
    adds = bias is not None or (x is not None and residual is not None)
    stream = given
    if out_residual is not None:
        stream = out_residual
    elif adds:
        stream = torch.empty((rows, width), dtype=torch.float32, device=given.device)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x,
        residual,
        bias,
        weight,
        norm_bias,
        stream,
        normalized,
        width,
        epsilon,
        STORE=stream is not given,
        CENTER=kind == "layer",
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return stream, normalized


@jit
def _add_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    bias,
    weight,
    norm_bias,
    stream,
    normalized,
    width,
    epsilon,
    STORE: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Arguments that are None are left out when this is compiled."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    row = tl.zeros([BLOCK], tl.float32)
    if residual is not None:
        row += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    if x is not None:
        row += tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        row += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    if STORE:
        tl.store(stream + at, row, mask=inside)
    if CENTER:
        row = tl.where(inside, row - tl.sum(row, 0) / width, 0)
    y = row / tl.sqrt(tl.sum(row * row, 0) / width + epsilon)
    y *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    if norm_bias is not None:
        y += tl.load(norm_bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(normalized + at, y.to(normalized.dtype.element_ty), mask=inside)
