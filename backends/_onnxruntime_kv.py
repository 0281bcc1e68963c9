"""Keys and values in int8 on ONNX Runtime: where their scales come from.

GroupQueryAttention takes an int8 cache with a scale per channel that must not change while the cache is filled. Channels
differ by a factor of ten and more, and are what they are for all tokens of a model, so the first tokens that a cache is
fed decide: the largest magnitude of a channel among them, with a margin for those to come. What exceeds it is clipped.

A key's channels i and i + head_dim / 2 are turned into each other by its position; the length of that pair is what is
measured, which holds for every position.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

LEVELS = 127

MARGIN = 2.0
"""Times the largest magnitude seen. Of the demo model's logits, 42 dB are right at worst with these two numbers, 21 with
a margin of 1 and a floor of 0.25, 40 with 3 and 0.25."""

FLOOR = 0.5
"""A channel's range is at least this share of the widest of its head: one that was quiet at first is not cut off."""

TINY = 1e-12
"""For channels of zeros, which are divided by their scale."""


def scales_of(rows: F32, is_key: bool) -> F32:
    """The scale of every channel, float32[kv_heads * head_dim], from `rows: float32[..., kv_heads, head_dim]`."""
    rows = rows.reshape(-1, *rows.shape[-2:])
    if is_key:
        pairs = np.square(rows).reshape(*rows.shape[:2], 2, -1).sum(2).max(0)
        ranges = np.tile(np.sqrt(pairs), (1, 2))
    else:
        ranges = np.abs(rows).max(0)
    ranges = np.maximum(ranges, ranges.max(-1, keepdims=True) * np.float32(FLOOR))
    scales: F32 = ranges * np.float32(MARGIN / LEVELS) + np.float32(TINY)
    return scales.ravel()


def quantize(rows: F32, scales: F32) -> npt.NDArray[np.int8]:
    """`rows: float32[..., kv_heads, head_dim]` as the operator stores them."""
    steps = np.rint(rows / scales.reshape(rows.shape[-2:]))
    stored: npt.NDArray[np.int8] = np.clip(steps, -LEVELS - 1, LEVELS).astype(np.int8)
    return stored


def dequantize(rows: npt.NDArray[np.int8], scales: F32) -> F32:
    """What stored rows stand for: float32[..., kv_heads, head_dim]."""
    values: F32 = rows * scales.reshape(rows.shape[-2:])
    return values


def scale_nodes(make: Any, rows: Any, least: Any, kv_heads: int, head_dim: int, is_key: bool) -> list[Any]:
    """The larger of `least: float32[channels]` and `scales_of(rows)`, rows being float32[batch, tokens, channels].

    Nodes, made by `make(kind, inputs, attributes)`, of which the last has the result.
    """

    def ints(*values: int) -> npt.NDArray[np.int64]:
        return np.array(values, np.int64)

    nodes: list[Any] = []

    def add(kind: str, *inputs: Any, **attributes: Any) -> Any:
        nodes.append(make(kind, inputs, attributes))
        return nodes[-1].outputs[0]

    if is_key:
        pairs = add("Reshape", rows, ints(-1, kv_heads, 2, head_dim // 2))
        squares = add("ReduceSum", add("Mul", pairs, pairs), ints(2), keepdims=0)
        halves = add("Sqrt", add("ReduceMax", squares, ints(0), keepdims=0))
        ranges = add("Concat", halves, halves, axis=1)
    else:
        split = add("Reshape", rows, ints(-1, kv_heads, head_dim))
        ranges = add("ReduceMax", add("Abs", split), ints(0), keepdims=0)
    widest = add("ReduceMax", ranges, ints(1), keepdims=1)
    ranges = add("Max", ranges, add("Mul", widest, np.array(FLOOR, np.float32)))
    scaled = add("Mul", ranges, np.array(MARGIN / LEVELS, np.float32))
    add("Max", add("Reshape", add("Add", scaled, np.array(TINY, np.float32)), ints(-1)), least)
    return nodes
