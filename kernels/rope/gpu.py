"""Rotary position embedding on a GPU, fused with the split of q, k and v and the write to the KV cache: a program takes
one token and one kv head, with all query heads that read it, and turns them by the same angles.

tl.sin and tl.cos become libdevice's sinf and cosf, which reduce their argument exactly and err by 2 units in the last
place; nothing here may be compiled with approximate functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

jit: Callable[[Any], Any] = triton.jit


def rope_append(
    qkv: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    past: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    num_heads: int,
    batch: int,
    tokens: int,
    out_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and append keys and values to the cache.

    qkv: float[batch * tokens, (num_heads + 2 * kv_heads) * head_dim], contiguous, q before k before v; cache_k, cache_v:
    float or int8 [batch, kv_heads, capacity, head_dim], contiguous, written at the positions past .. past + tokens - 1,
    of which those beyond the capacity are dropped; scale_k, scale_v: float32[batch, kv_heads, capacity], for int8
    only; past: int32[1]; inverse_frequencies: float32[head_dim / 2].
    Returns the rotated queries, [batch * tokens, num_heads, head_dim] in the dtype of qkv, or `out_q`.
    """
    _, kv_heads, capacity, head_dim = cache_k.shape
    if out_q is None:
        out_q = torch.empty((batch * tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    group = num_heads // kv_heads
    _rope_append[(batch * tokens, kv_heads)](
        qkv,
        out_q,
        cache_k,
        cache_v,
        scale_k,
        scale_v,
        past,
        inverse_frequencies,
        tokens,
        capacity,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=triton.next_power_of_2(group),
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=2,
    )
    return out_q


@jit
def _rope_append(  # type: ignore[no-untyped-def]
    qkv,
    out_q,
    cache_k,
    cache_v,
    scale_k,
    scale_v,
    past,
    inverse_frequencies,
    tokens,
    capacity,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    position = tl.load(past) + row % tokens
    half = tl.arange(0, HALF_BLOCK)
    inside = half < HALF
    angle = position.to(tl.float32) * tl.load(inverse_frequencies + half, mask=inside, other=0)
    cos = tl.cos(angle)
    sin = tl.sin(angle)

    member = tl.arange(0, GROUP_BLOCK)
    head = kv_head * GROUP + member
    whole = (member < GROUP)[:, None] & inside[None, :]
    columns = head[:, None] * (2 * HALF) + half[None, :]
    source = qkv + row.to(tl.int64) * ((GROUP + 2) * KV_HEADS * 2 * HALF)
    first = tl.load(source + columns, mask=whole, other=0).to(tl.float32)
    second = tl.load(source + columns + HALF, mask=whole, other=0).to(tl.float32)
    target = out_q + row.to(tl.int64) * (GROUP * KV_HEADS * 2 * HALF) + columns
    kind = out_q.dtype.element_ty
    tl.store(target, (first * cos[None, :] - second * sin[None, :]).to(kind), mask=whole)
    tl.store(target + HALF, (second * cos[None, :] + first * sin[None, :]).to(kind), mask=whole)

    source += GROUP * KV_HEADS * 2 * HALF + kv_head * 2 * HALF + half
    first = tl.load(source, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0).to(tl.float32)
    place = ((row // tokens) * KV_HEADS + kv_head).to(tl.int64) * capacity + position
    room = position < capacity
    _append(cache_k, scale_k, place, first * cos - second * sin, second * cos + first * sin, room, HALF, HALF_BLOCK)
    source += KV_HEADS * 2 * HALF
    first = tl.load(source, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0).to(tl.float32)
    _append(cache_v, scale_v, place, first, second, room, HALF, HALF_BLOCK)


@jit
def _append(  # type: ignore[no-untyped-def]
    cache, scales, place, first, second, room, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr
):
    """Store the two halves of a row at `place`; with scales, in int8: value = integer * scale, scale = max / 127."""
    half = tl.arange(0, HALF_BLOCK)
    inside = (half < HALF) & room
    target = cache + place * (2 * HALF) + half
    if scales is not None:
        largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
        scale = largest * (1.0 / 127.0)
        # Below the smallest normal number the quotient would be too coarse: such a row counts as zeros.
        scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
        divisor = tl.where(scale == 0, 1.0, scale)
        first = tl.where(scale == 0, 0.0, _rounded(first / divisor))
        second = tl.where(scale == 0, 0.0, _rounded(second / divisor))
        tl.store(scales + place, scale, mask=room)
    tl.store(target, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(cache.dtype.element_ty), mask=inside)


@jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """The nearest whole number, ties to even, for |x| < 2^22: 1.5 * 2^23 leaves no bits for fractions."""
    return (x + 12582912.0) - 12582912.0
