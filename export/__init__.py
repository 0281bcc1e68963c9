"""Checkpoint to verified, portable graphs. torch lives here; `graph` and `quantize.scheme` do without it."""
