"""Attention of the tokens of one step of decoding. It is a matter of memory: a program reads a part of the context once,
for all query heads that share a kv head, and the last to finish adds up the parts, so that it is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .block import LOG2E, LOWEST, attend

jit: Callable[[Any], Any] = triton.jit

_PROGRAMS = 128
"""That read a cache at once: about one for each multiprocessor of a large GPU."""


@dataclass(frozen=True)
class DecodeScratch:
    """What the programs of `decode_attention` tell each other. Launches that share one must follow one another."""

    largest: torch.Tensor
    """float32[batch * kv_heads, splits, rows], rows = tokens * num_heads / kv_heads."""
    total: torch.Tensor
    """float32[batch * kv_heads, splits, rows]"""
    mixed: torch.Tensor
    """float32[batch * kv_heads, splits, rows, head_dim]"""
    finished: torch.Tensor
    """int32[batch * kv_heads], zeros between launches."""

    @property
    def splits(self) -> int:
        return self.largest.shape[1]


def decode_scratch(
    batch: int,
    tokens: int,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    splits: int | None = None,
) -> DecodeScratch:
    """Allocate the scratch of one shape. splits: into how many parts a context is cut at most."""
    pairs = batch * kv_heads
    rows = tokens * (num_heads // kv_heads)
    splits = max(_PROGRAMS // pairs, 1) if splits is None else splits
    return DecodeScratch(
        torch.zeros((pairs, splits, rows), dtype=torch.float32, device=device),
        torch.zeros((pairs, splits, rows), dtype=torch.float32, device=device),
        torch.zeros((pairs, splits, rows, head_dim), dtype=torch.float32, device=device),
        torch.zeros(pairs, dtype=torch.int32, device=device),
    )


def decode_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    past: torch.Tensor,
    scale: float,
    batch: int,
    tokens: int,
    scratch: DecodeScratch,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from token t of a sequence to the positions 0 .. past + t, for up to about 8 tokens.

    q: float[batch * tokens, num_heads, head_dim], rotated, contiguous; cache_k, cache_v: float or int8 [batch, kv_heads,
    capacity, head_dim], contiguous, which hold the tokens' own rows; scale_k, scale_v: float32[batch, kv_heads,
    capacity], for int8 only; past: int32[1]; scale: of the logits; scratch: made for this shape.
    Returns [batch * tokens, num_heads * head_dim] in the dtype of q, or `out`.
    """
    num_heads, head_dim = q.shape[1:]
    kv_heads, capacity = cache_k.shape[1:3]
    group = num_heads // kv_heads
    if out is None:
        out = torch.empty((batch * tokens, num_heads * head_dim), dtype=q.dtype, device=q.device)
    splits = scratch.splits
    dim_block = max(triton.next_power_of_2(head_dim), 16)
    split_block = triton.next_power_of_2(splits)
    _decode[(splits, batch * kv_heads)](
        q,
        cache_k,
        cache_v,
        scale_k,
        scale_v,
        past,
        scratch.largest,
        scratch.total,
        scratch.mixed,
        scratch.finished,
        out,
        scale * LOG2E.value,
        tokens,
        capacity,
        splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=head_dim,
        DIM_BLOCK=dim_block,
        ROWS=tokens * group,
        ROW_BLOCK=max(triton.next_power_of_2(tokens * group), 16),
        KEYS=16 if q.dtype == torch.float32 else 64,
        SPLIT_BLOCK=split_block,
        # What is summed at once is held in registers: 64 numbers a thread.
        SUM_ROWS=min(max(8192 // (split_block * dim_block), 1), triton.next_power_of_2(tokens * group)),
        num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    return out


@jit
def _decode(  # type: ignore[no-untyped-def]
    q,
    cache_k,
    cache_v,
    scale_k,
    scale_v,
    past,
    part_largest,
    part_total,
    part_mixed,
    finished,
    out,
    scale,
    tokens,
    capacity,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """One program a part of the context of one kv head. Row r of it is query head r % GROUP of token r // GROUP."""
    split = tl.program_id(0)
    pair = tl.program_id(1)
    seen = tl.load(past)
    length = tl.minimum(seen + tokens, capacity)
    span = tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS
    parts = tl.cdiv(length, span)
    start = split * span
    if start >= length:
        return
    end = tl.minimum(start + span, length)

    row = tl.arange(0, ROW_BLOCK)
    column = tl.arange(0, DIM_BLOCK)
    first_row = (pair // KV_HEADS) * tokens
    first_head = (pair % KV_HEADS) * GROUP
    inside = (row < ROWS)[:, None] & (column < DIM)[None, :]
    at = ((first_row + row // GROUP) * (KV_HEADS * GROUP) + first_head + row % GROUP)[:, None] * DIM + column[None, :]
    query = tl.load(q + at, mask=inside, other=0)
    place = pair.to(tl.int64) * capacity
    if scale_k is not None:
        scale_k += place
        scale_v += place

    last = seen + row // GROUP
    # Not -inf: a token may see nothing of the last part.
    largest = tl.full([ROW_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROW_BLOCK], tl.float32)
    mixed = tl.zeros([ROW_BLOCK, DIM_BLOCK], tl.float32)
    for first_key in range(start, end, KEYS):
        largest, total, mixed = attend(
            query,
            largest,
            total,
            mixed,
            cache_k + place * DIM,
            cache_v + place * DIM,
            scale_k,
            scale_v,
            first_key + tl.arange(0, KEYS),
            end,
            last,
            scale,
            DIM,
            DIM_BLOCK,
            True,
        )

    own = (pair * splits + split) * ROWS + row
    tl.store(part_largest + own, largest, mask=row < ROWS)
    tl.store(part_total + own, total, mask=row < ROWS)
    tl.store(part_mixed + own[:, None] * DIM + column[None, :], mixed, mask=inside)
    # All threads have stored before one of them says so; who then counts the last part sees what all have stored.
    tl.debug_barrier()
    if tl.atomic_add(finished + pair, 1, sem="acq_rel") == parts - 1:
        tl.store(finished + pair, 0)
        part = tl.arange(0, SPLIT_BLOCK)
        for first in tl.static_range(0, ROWS, SUM_ROWS):
            _sum_parts(
                part_largest,
                part_total,
                part_mixed,
                out,
                pair * splits + part,
                part < parts,
                first + tl.arange(0, SUM_ROWS),
                first_row,
                first_head,
                KV_HEADS,
                GROUP,
                DIM,
                DIM_BLOCK,
                ROWS,
            )


@jit
def _sum_parts(  # type: ignore[no-untyped-def]
    part_largest,
    part_total,
    part_mixed,
    out,
    part,
    finished,
    row,
    first_row,
    first_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add up the finished parts of some rows. What other multiprocessors wrote is read past the first-level cache."""
    column = tl.arange(0, DIM_BLOCK)
    at = part[:, None] * ROWS + row[None, :]
    there = finished[:, None] & (row < ROWS)[None, :]
    whole = there[:, :, None] & (column < DIM)[None, None, :]
    mixed = tl.load(
        part_mixed + at[:, :, None] * DIM + column[None, None, :], mask=whole, other=0, cache_modifier=".cg"
    )
    largest = tl.load(part_largest + at, mask=there, other=LOWEST, cache_modifier=".cg")
    total = tl.load(part_total + at, mask=there, other=0, cache_modifier=".cg")
    weights = tl.exp2(largest - tl.max(largest, 0)[None, :])
    # Rows of the block beyond ROWS have no weights at all.
    sums = tl.where(row < ROWS, tl.sum(weights * total, 0), 1)
    y = tl.sum(weights[:, :, None] * mixed, 0) / sums[:, None]
    target = ((first_row + row // GROUP) * (KV_HEADS * GROUP) + first_head + row % GROUP)[:, None] * DIM
    inside = (row < ROWS)[:, None] & (column < DIM)[None, :]
    tl.store(out + target + column[None, :], y.to(out.dtype.element_ty), mask=inside)
