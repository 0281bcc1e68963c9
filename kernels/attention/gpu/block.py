"""What every attention on a GPU does with a block of keys: keep, for each query, the largest logit so far, the sum of weights
and the weighted sum of values (Milakov and Gimelshein 2018). Logits are in units of log 2, so that weights are powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

jit: Callable[[Any], Any] = triton.jit

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e30)
"""Below every logit, and finite: -inf less -inf would be no number."""
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@jit
def dot(a, b, sums):  # type: ignore[no-untyped-def]
    """sums + a b, in float32."""
    if _INTERPRETED:
        # It would multiply the bits of bfloat16 as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@jit
def weigh(logits, largest, total):  # type: ignore[no-untyped-def]
    """Weights of a block of keys, by what sums so far must shrink, and the largest logit and the total with them."""
    higher = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(largest - higher)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@jit
def attend(  # type: ignore[no-untyped-def]
    query,
    largest,
    total,
    mixed,
    keys,
    values,
    key_scales,
    value_scales,
    key,
    end,
    last,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to one block of a cache, at the positions `key`; MASKED: only to those before `end`, and to none after a
    row's own, `last`.
    """
    column = tl.arange(0, DIM_BLOCK)
    at = key.to(tl.int64)[:, None] * DIM + column[None, :]
    there = (column < DIM)[None, :]
    if MASKED:
        there &= (key < end)[:, None]
    block = tl.load(keys + at, mask=there, other=0).to(tl.float32).to(query.dtype)
    logits = dot(query, tl.trans(block), tl.zeros([query.shape[0], key.shape[0]], tl.float32)) * scale
    if key_scales is not None:
        logits *= tl.load(key_scales + key, mask=key < end, other=0)[None, :]
    if MASKED:
        logits = tl.where((key[None, :] <= last[:, None]) & (key < end)[None, :], logits, float("-inf"))
    weights, shrink, largest, total = weigh(logits, largest, total)
    if value_scales is not None:
        weights *= tl.load(value_scales + key, mask=key < end, other=0)[None, :]
    block = tl.load(values + at, mask=there, other=0).to(tl.float32).to(query.dtype)
    return largest, total, dot(weights.to(query.dtype), block, mixed * shrink[:, None])
