"""Attention on a GPU: over the KV cache, of a few tokens and of many, and of every query to all keys."""

from .decode import DecodeScratch, decode_attention, decode_scratch
from .full import attention
from .one_token import one_token, takes_one_token
from .prefill import prefill_attention

__all__ = [
    "DecodeScratch",
    "attention",
    "decode_attention",
    "decode_scratch",
    "one_token",
    "prefill_attention",
    "takes_one_token",
]
