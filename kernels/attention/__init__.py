"""Attention: causal over a KV cache, and of every query to all keys."""
