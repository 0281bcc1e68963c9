"""How far a compiler is with what it does: the engine says it, and whoever waits for it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []
"""The innermost last. Compilers have threads of their own, so it is one list for all threads."""


def report_part(text: str) -> None:
    """Say which part of its work a compiler is in, e.g. `Building engine 2/6`. Any thread may."""
    for listener in _listeners[-1:]:
        listener(text)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """While inside, `listener` is told what compilers report, and nobody else is."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()
