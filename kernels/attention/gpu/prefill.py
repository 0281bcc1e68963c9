"""Causal attention of many tokens over the KV cache that holds them: a program takes a block of queries of one head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .block import LOG2E, attend

jit: Callable[[Any], Any] = triton.jit


def prefill_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    past: torch.Tensor,
    scale: float,
    batch: int,
    tokens: int,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from token t of a sequence to the positions 0 .. past + t, for any number of tokens.

    Arguments and result are those of `decode_attention`, without its scratch.
    """
    num_heads, head_dim = q.shape[1:]
    kv_heads, capacity = cache_k.shape[1:3]
    if out is None:
        out = torch.empty((batch * tokens, num_heads * head_dim), dtype=q.dtype, device=q.device)
    exact = q.dtype == torch.float32
    queries = 32 if exact else 128
    _prefill[(triton.cdiv(tokens, queries), batch * num_heads)](
        q,
        cache_k,
        cache_v,
        scale_k,
        scale_v,
        past,
        out,
        scale * LOG2E.value,
        tokens,
        capacity,
        HEADS=num_heads,
        GROUP=num_heads // kv_heads,
        DIM=head_dim,
        DIM_BLOCK=max(triton.next_power_of_2(head_dim), 16),
        QUERIES=queries,
        KEYS=32 if exact else 64,
        num_warps=8,
        num_stages=2 if exact else 3,
    )
    return out


@jit
def _prefill(  # type: ignore[no-untyped-def]
    q,
    cache_k,
    cache_v,
    scale_k,
    scale_v,
    past,
    out,
    scale,
    tokens,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program a block of queries of one head; those that see most come first, so that no long one is left alone."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    sequence = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    token = first + tl.arange(0, QUERIES)
    column = tl.arange(0, DIM_BLOCK)
    inside = (token < tokens)[:, None] & (column < DIM)[None, :]
    at = ((sequence * tokens + token).to(tl.int64) * HEADS + head)[:, None] * DIM + column[None, :]
    query = tl.load(q + at, mask=inside, other=0)
    place = (sequence * (HEADS // GROUP) + head // GROUP).to(tl.int64) * capacity
    if scale_k is not None:
        scale_k += place
        scale_v += place

    seen = tl.load(past)
    last = seen + token
    end = tl.minimum(seen + tl.minimum(first + QUERIES, tokens), capacity)
    # Keys up to here are seen by every query of the block.
    common = tl.minimum(seen + first + 1, end) // KEYS * KEYS
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    for first_key in range(0, common, KEYS):
        key = first_key + tl.arange(0, KEYS)
        largest, total, mixed = attend(
            query,
            largest,
            total,
            mixed,
            cache_k + place * DIM,
            cache_v + place * DIM,
            scale_k,
            scale_v,
            key,
            end,
            last,
            scale,
            DIM,
            DIM_BLOCK,
            False,
        )
    for first_key in range(common, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        largest, total, mixed = attend(
            query,
            largest,
            total,
            mixed,
            cache_k + place * DIM,
            cache_v + place * DIM,
            scale_k,
            scale_v,
            key,
            end,
            last,
            scale,
            DIM,
            DIM_BLOCK,
            True,
        )
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
