"""Attention of a single token, rotary embedding and cache included, as one kernel. See one_token.cu."""

from __future__ import annotations

from pathlib import Path

import torch

from lensc.kernels import nvrtc

from .decode import DecodeScratch

_SOURCE = Path(__file__).with_name("one_token.cu")
_THREADS = 512
DIM = 128
"""Dimensions of a head: the only number of them that the kernel knows."""


_SHARED_BY = 4
"""Query heads that read the same keys, at most: what they sum up lies in 48 KB of shared memory."""


def takes_one_token(qkv: torch.Tensor, cache_k: torch.Tensor) -> bool:
    """Whether the kernel takes these on this device: bfloat16, one row, heads of 128 dimensions of which up to 4 read the
    same keys, Hopper or newer.
    """
    kv_heads = cache_k.shape[1]
    shared_by = (qkv.shape[1] // DIM - 2 * kv_heads) // kv_heads
    fits = qkv.shape[0] == 1 and cache_k.shape[0] == 1 and cache_k.shape[3] == DIM
    is_bfloat16 = qkv.dtype == cache_k.dtype == torch.bfloat16
    is_known = is_bfloat16 and fits and shared_by <= _SHARED_BY
    return qkv.is_cuda and is_known and torch.cuda.get_device_capability(qkv.device)[0] >= 9


def one_token(
    qkv: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    past: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    num_heads: int,
    scale: float,
    scratch: DecodeScratch,
) -> torch.Tensor:
    """What `rope_append` and `decode_attention` do, for one token of one sequence.

    qkv: bfloat16[1, (num_heads + 2 * kv_heads) * 128]; caches: bfloat16[1, kv_heads, capacity, 128], with room at `past`,
    int32[1] on the device; inverse_frequencies: float32[64]. Returns bfloat16[1, num_heads * 128]. Raises UnavailableError
    where NVRTC is missing.
    """
    kv_heads, capacity = cache_k.shape[1:3]
    major, minor = torch.cuda.get_device_capability(qkv.device)
    definitions = (("HEADS", num_heads), ("KV_HEADS", kv_heads))
    kernel = nvrtc.kernel(_SOURCE, "one_token", definitions, qkv.device.index or 0, f"sm_{major}{minor}")
    out = torch.empty(1, num_heads * DIM, dtype=torch.bfloat16, device=qkv.device)
    first, second = (qkv, cache_k, cache_v), (past, inverse_frequencies)
    third = (scratch.largest, scratch.total, scratch.mixed, scratch.finished, out)
    arguments = [
        *((tensor.data_ptr(), nvrtc.POINTER) for tensor in first),
        (capacity, nvrtc.INT),
        *((tensor.data_ptr(), nvrtc.POINTER) for tensor in second),
        (scale, nvrtc.FLOAT),
        *((tensor.data_ptr(), nvrtc.POINTER) for tensor in third),
    ]
    stream = torch.cuda.current_stream(qkv.device).cuda_stream
    kernel.launch(kv_heads * scratch.splits, _THREADS, 0, arguments, stream)
    return out
