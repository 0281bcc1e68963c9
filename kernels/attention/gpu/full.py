"""Attention of every query to all keys of its slice: a program takes a block of queries of one head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .block import LOG2E, LOWEST, dot, weigh

jit: Callable[[Any], Any] = triton.jit


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """Attend from every query to all keys of its slice.

    q: float[slices, queries, heads * dim], or of one slice if it is the same for all; k, v: float[slices, keys, heads *
    dim]; rows may have any strides, but their elements lie side by side; bias: float32[slices, keys], contiguous, added
    to the scaled logits; scale: of the logits. Returns [slices * queries, heads * dim] in the dtype of q.
    """
    slices, keys, width = k.shape
    queries = q.shape[1]
    dim = width // heads
    main, rest = _columns(dim)
    out = torch.empty((slices * queries, width), dtype=q.dtype, device=q.device)
    exact = q.dtype == torch.float32
    query_block = 32 if exact else 128
    key_block = 32 if exact else 64
    _attention[(triton.cdiv(queries, query_block), slices * heads)](
        q,
        k,
        v,
        bias,
        out,
        scale * LOG2E.value,
        queries,
        keys,
        0 if q.shape[0] == 1 else q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEADS=heads,
        DIM=dim,
        MAIN=main,
        REST=rest,
        QUERIES=query_block,
        KEYS=key_block,
        EVEN=keys % key_block == 0,
        num_warps=4 if exact else 8,
        num_stages=2 if exact else 3,
    )
    return out


def _columns(dim: int) -> tuple[int, int]:
    """How many columns are multiplied for `dim`: a power of 2, and another beside it (or 0) if both are fewer than the
    power of 2 above. 72 becomes 64 + 16 instead of 128.
    """
    whole = max(triton.next_power_of_2(dim), 16)
    rest = max(triton.next_power_of_2(dim - whole // 2), 16) if dim < whole else 0
    return (whole // 2, rest) if rest and whole // 2 >= 16 and rest < whole // 2 else (whole, 0)


@jit
def _attention(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    bias,
    out,
    scale,
    queries,
    keys,
    q_slice,
    q_row,
    k_slice,
    k_row,
    v_slice,
    v_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program a block of queries of one head of one slice. Columns are multiplied as MAIN + REST."""
    own = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    asked = (query < queries)[:, None]
    main = tl.arange(0, MAIN)[None, :]
    q += own.to(tl.int64) * q_slice + head * DIM
    k += own.to(tl.int64) * k_slice + head * DIM
    v += own.to(tl.int64) * v_slice + head * DIM
    out += (own.to(tl.int64) * queries * HEADS + head) * DIM
    query_main = tl.load(q + query[:, None] * q_row + main, mask=asked & (main < DIM), other=0)
    mixed_main = tl.zeros([QUERIES, MAIN], tl.float32)
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]
        query_rest = tl.load(q + query[:, None] * q_row + rest, mask=asked & (rest < DIM), other=0)
        mixed_rest = tl.zeros([QUERIES, REST], tl.float32)

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for first_key in range(0, keys, KEYS):
        key = first_key + tl.arange(0, KEYS)
        there_main = main < DIM
        if not EVEN:
            there_main &= (key < keys)[:, None]
        block = tl.load(k + key[:, None] * k_row + main, mask=there_main, other=0)
        logits = dot(query_main, tl.trans(block), tl.zeros([QUERIES, KEYS], tl.float32))
        if REST:
            there_rest = rest < DIM
            if not EVEN:
                there_rest &= (key < keys)[:, None]
            block = tl.load(k + key[:, None] * k_row + rest, mask=there_rest, other=0)
            logits = dot(query_rest, tl.trans(block), logits)
        logits *= scale
        if bias is not None:
            shift = tl.load(bias + own * keys + key, mask=key < keys, other=0)
            logits += tl.maximum(shift, LOWEST)[None, :] * LOG2E
        if not EVEN:
            logits = tl.where((key < keys)[None, :], logits, float("-inf"))
        weights, shrink, largest, total = weigh(logits, largest, total)
        weights = weights.to(q.dtype.element_ty)
        block = tl.load(v + key[:, None] * v_row + main, mask=there_main, other=0)
        mixed_main = dot(weights, block, mixed_main * shrink[:, None])
        if REST:
            block = tl.load(v + key[:, None] * v_row + rest, mask=there_rest, other=0)
            mixed_rest = dot(weights, block, mixed_rest * shrink[:, None])

    y = mixed_main / total[:, None]
    tl.store(out + query[:, None] * (HEADS * DIM) + main, y.to(out.dtype.element_ty), mask=asked & (main < DIM))
    if REST:
        y = mixed_rest / total[:, None]
        tl.store(out + query[:, None] * (HEADS * DIM) + rest, y.to(out.dtype.element_ty), mask=asked & (rest < DIM))
