"""The parts of the model that engines have one operator for, as plain torch functions.

In a traced graph each call is one node of the domain `lensc`, whose definition in standard operators
(`lensc.export.functions`) travels with the graph: an engine replaces the node by an operator of its own or inlines the
definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MASK = -1e4
"""In the place of -inf: exp(MASK) is 0 in every float format, and no format overflows, not even float16."""

FUNCTIONS_VERSION = 1


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight along the last axis, in float32."""
    if torch.compiler.is_exporting():
        return _call("RMSNorm", (x, weight), {"epsilon": epsilon}, [x.shape])[0]
    y = x.float()
    y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * y.to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention that sees every key, softmax in float32.

    query: [B or 1, Q, H * d]; key, value: [B, N, H * d]; bias: [B, N], added to the logits of each key. Returns
    [B, Q, H * d].
    """
    scale = float((query.shape[-1] // num_heads) ** -0.5)
    if torch.compiler.is_exporting():
        shape = (key.shape[0], query.shape[1], query.shape[2])
        inputs = (query, key, value, bias)
        return _call("Attention", inputs, {"num_heads": num_heads, "scale": scale}, [shape])[0]

    def heads(x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)

    scores = (heads(query) * scale) @ heads(key).transpose(-1, -2) + bias[:, None, None, :]
    mixed = torch.softmax(scores.float(), dim=-1).to(value.dtype) @ heads(value)
    return mixed.transpose(1, 2).flatten(2)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    inverse_frequencies: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention with rotary embedding over past rows and new rows.

    query: [B, S, H * d]; key, value: [B, S, K * d]; position_ids: int64[S], the same for the batch;
    inverse_frequencies: float32[d / 2]; past_key, past_value: [P, B, K, d], keys rotated. Returns the mixed
    [B, S, H * d] and the new keys (rotated) and values [S, B, K, d].

    Past and new rows are never concatenated: the cache is not copied. Both parts' scores share one softmax. Heads of a
    group share a key/value head by folding the group into the query rows, so keys and values are not repeated either.
    """
    batch, tokens = query.shape[:2]
    head_dim = query.shape[-1] // num_heads
    groups, scale = num_heads // kv_num_heads, float(head_dim**-0.5)
    if torch.compiler.is_exporting() and past_key is not None and past_value is not None:
        sizes = {"num_heads": num_heads, "kv_num_heads": kv_num_heads, "head_dim": head_dim, "groups": groups}
        inputs = (query, key, value, position_ids, inverse_frequencies, past_key, past_value)
        rows_shape = (tokens, batch, kv_num_heads, head_dim)
        mixed, new_key, new_value = _call(
            "CausalAttention", inputs, {**sizes, "scale": scale}, [query.shape, rows_shape, rows_shape]
        )
        return mixed, new_key, new_value

    angles = position_ids.float()[:, None] * inverse_frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
    q = _rotate(torch.unflatten(query, -1, (num_heads, head_dim)), cos, sin) * scale
    k = _rotate(torch.unflatten(key, -1, (kv_num_heads, head_dim)), cos, sin)
    v = torch.unflatten(value, -1, (kv_num_heads, head_dim))
    visible = position_ids[:, None] >= position_ids[None, :]
    causal = torch.where(visible, 0.0, MASK).to(query.dtype)

    # [B, K, groups * S, d]: row g * S + t is head g of the group at token t
    rows = torch.unflatten(q, 2, (kv_num_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = rows @ k.permute(0, 2, 3, 1) + causal.repeat(groups, 1)
    if past_key is None or past_value is None:
        mixed = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v.transpose(1, 2)
    else:
        scores = torch.cat((rows @ past_key.permute(1, 2, 3, 0), scores), dim=-1)
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        length = past_key.shape[0]
        mixed = weights[..., :length] @ past_value.permute(1, 2, 0, 3) + weights[..., length:] @ v.transpose(1, 2)
    mixed = torch.unflatten(mixed, 2, (groups, tokens)).permute(0, 3, 1, 2, 4).reshape(batch, tokens, -1)
    return mixed, k.transpose(0, 1), v.transpose(0, 1)


def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The rotary embedding's float32[head_dim / 2]: 1 / theta ** (2i / head_dim)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    # the power in float64: float32 powers differ by an ulp between torch and numpy, which folds this into a constant
    # of the graph, and an ulp is 4e-4 radians at position 8000
    powers = (theta ** exponents.double()).float()
    return 1.0 / powers


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of x: [B, S, heads, d] (half-split convention)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None, :] + turned * sin[:, None, :]).to(x.dtype)


def _call(
    name: str, inputs: tuple[Tensor, ...], attributes: Mapping[str, int | float], shapes: Sequence[Sequence[Any]]
) -> tuple[Tensor, ...]:
    """One node `lensc.<name>` in the graph being traced; its outputs have the first input's dtype and these shapes."""
    dtype, device = inputs[0].dtype, inputs[0].device
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"lensc::{name}",
        inputs,
        dict(attributes),
        dtypes=[dtype] * len(shapes),
        shapes=shapes,
        version=FUNCTIONS_VERSION,
    )
    # torch makes them on the CPU, whatever the device of the trace
    return tuple(output.to(device) for output in outputs)
