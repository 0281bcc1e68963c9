"""KV caches of earlier answers: what a new prompt has in common with one of them is not fed again.

The turns of a chat begin with all turns before, and two questions about one picture with the picture. A row of a prompt is
known by what was fed: a token by its id, a row of a picture by the hash of the slice that it is an embedding of. So a
picture that is not the same, or is padded otherwise, is never taken for one that is.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Cache

from .prompt import Prompt

Rows = npt.NDArray[np.uint64]
"""uint64[tokens, 4]: a token's id and three zeros, or the SHA-256 of all that a slice's features depend on."""

PREFIX_BYTES = 256 << 20
"""Keys and values kept beside those of the answer that is made: 2000 tokens of a full-size model in float16."""

LEAST = 32
"""Rows worth a cache: with fewer, prompts have no more than the words of the chat template in common."""


def rows_of(prompt: Prompt, slice_keys: Sequence[bytes]) -> Rows:
    """The rows of `prompt`; `slice_keys` are the SHA-256 of its slices, in order."""
    rows = token_rows(prompt.ids)
    for (start, end), key in zip(prompt.image_bounds.tolist(), slice_keys, strict=True):
        rows[start:end] = np.frombuffer(key, np.uint64)
    return rows


def token_rows(ids: Sequence[int] | npt.NDArray[np.int64]) -> Rows:
    """The rows of plain tokens."""
    rows = np.zeros((len(ids), 4), np.uint64)
    rows[:, 0] = ids
    return rows


def common_length(a: Rows, b: Rows) -> int:
    """With how many equal rows two prompts begin."""
    n = min(len(a), len(b))
    differs = (a[:n] != b[:n]).any(axis=1)
    return int(differs.argmax()) if differs.any() else n


@dataclass(frozen=True, eq=False)
class Held:
    """A cache, and the rows that it holds."""

    rows: Rows
    cache: Cache


class PrefixCache:
    """Caches that no answer uses at the moment, the least recently used first to go.

    The last one stays, whatever its size, until a prompt comes that has nothing in common with it; of all others, and of
    all while such a prompt is answered, `limit_bytes` stay. 0 keeps none at any time.
    """

    def __init__(self, limit_bytes: int = PREFIX_BYTES) -> None:
        self._limit_bytes = limit_bytes
        # A generator that the collector drops gives its cache back, and may do so while the lock is held.
        self._lock = threading.RLock()
        self._held: list[Held] = []

    def longest(self, rows: Rows) -> int:
        """Of how many of `rows` a cache would be found; nothing is taken."""
        with self._lock:
            found = max((min(common_length(held.rows, rows), len(rows) - 1) for held in self._held), default=0)
        return found if found >= LEAST else 0

    def take(self, rows: Rows) -> Cache | None:
        """A cache that holds the longest known beginning of `rows`, and no more; its last row is left to be fed.

        The caller owns it. Where most of a cache would be lost and there is room, it is a copy.
        """
        with self._lock:
            length, found = LEAST - 1, None
            for held in self._held:
                common = min(common_length(held.rows, rows), len(rows) - 1)
                if common > length:
                    length, found = common, held
            if found is None:
                self._drop(self._limit_bytes)
                return None
            used = sum(held.cache.used_bytes for held in self._held)
            if 2 * length < found.cache.length and used + found.cache.used_bytes <= self._limit_bytes:
                cache = found.cache.fork(1)
            else:
                self._held.remove(found)
                cache = found.cache
        cache.trim(length)
        return cache

    def give(self, rows: Rows, cache: Cache) -> None:
        """Keep `cache`, a batch of one, which holds `rows` and belongs to nobody from now on."""
        with self._lock:
            if self._limit_bytes and cache.length >= LEAST:
                self._drop(self._limit_bytes)
                self._held.append(Held(rows[: cache.length], cache))

    def clear(self, for_good: bool = False) -> None:
        """Let go of everything, and keep nothing anymore if it is `for_good`."""
        with self._lock:
            self._held.clear()
            if for_good:
                self._limit_bytes = 0

    def _drop(self, limit_bytes: int) -> None:
        while self._held and sum(held.cache.used_bytes for held in self._held) > limit_bytes:
            del self._held[0]
