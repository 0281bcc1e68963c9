"""What a graph takes for so much work, as it was measured here since it was loaded."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from statistics import median

KEPT = 7
"""Measurements of a size that count, the latest; their median is taken, so that one that was interrupted does not matter."""


class Curve:
    """Milliseconds by size: patches of a slice, or tokens that are fed at once.

    Between sizes that were measured it is a line; beyond them it goes through zero. The first run of a size counts until
    there is a second: engines prepare for it. Threads may add to it at the same time.
    """

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._later: dict[int, deque[float]] = {}
        self._lock = threading.Lock()

    def add(self, size: int, ms: float) -> None:
        """It was measured."""
        with self._lock:
            if size in self._first:
                self._later.setdefault(size, deque(maxlen=KEPT)).append(ms)
            else:
                self._first[size] = ms

    def at(self, size: int) -> float | None:
        """What it is expected to take; None if nothing is known."""
        with self._lock:
            known = {n: median(self._later.get(n, (ms,))) for n, ms in self._first.items()}
        sizes = sorted(known)
        if not sizes:
            return None
        above = bisect_left(sizes, size)
        if above == len(sizes):
            return known[sizes[-1]] * size / sizes[-1]
        upper = sizes[above]
        lower = sizes[above - 1] if above else 0
        start = known[lower] if above else 0.0
        return start + (known[upper] - start) * (size - lower) / (upper - lower)
