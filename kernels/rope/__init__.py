"""Rotary position embedding, and the rows of the KV cache."""
