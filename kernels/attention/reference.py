"""Attention as its formula, in float64: softmax(scale · Q Kᵀ + bias) V for each head."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def softmax(logits: Floats) -> Floats:
    """Weights along the last axis: positive, sum 1."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    normal: Floats = weights / weights.sum(-1, keepdims=True)
    return normal


def causal_attention(query: Array, keys: Array, values: Array, past: int, scale: float) -> Floats:
    """Attend from token t to the positions 0 .. past + t.

    query: float[tokens, heads, dim], rotated; keys, values: float[kv_heads, capacity, dim], a cache that holds the
    tokens' own rows at past .. past + tokens - 1. Head h reads kv head h // (heads / kv_heads).
    Returns float64[tokens, heads * dim].
    """
    tokens, heads, dim = query.shape
    end, group = past + tokens, heads // keys.shape[0]
    k, v = (np.repeat(np.asarray(rows[:, :end], np.float64), group, axis=0) for rows in (keys, values))
    logits = np.einsum("thd,hkd->htk", np.asarray(query, np.float64), k) * scale
    seen = np.arange(end) <= past + np.arange(tokens)[:, None]
    weights = softmax(np.where(seen, logits, -np.inf))
    mixed: Floats = np.einsum("htk,hkd->thd", weights, v).reshape(tokens, heads * dim)
    return mixed


def attention(query: Array, key: Array, value: Array, bias: Array | None, heads: int, scale: float) -> Floats:
    """Attend from every query to all keys of its slice.

    query: float[slices, queries, heads * dim]; key, value: float[slices, keys, heads * dim]; bias: float[slices,
    keys], added to the scaled logits; where it masks all keys alike they count alike.
    Returns float64[slices, queries, heads * dim].
    """
    q, k, v = (np.asarray(x, np.float64).reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    logits = np.einsum("sqhd,skhd->shqk", q, k) * scale
    if bias is not None:
        # As small as it takes to lose the logits beside it, and finite: -inf less -inf would be no number.
        logits = logits + np.maximum(np.asarray(bias, np.float64), -1e30)[:, None, None]
    mixed: Floats = np.einsum("shqk,skhd->sqhd", softmax(logits), v).reshape(query.shape)
    return mixed
