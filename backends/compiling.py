"""What a compiler and whoever waits for it say to each other: whether it can begin at all, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from .base import Backend, Target


@runtime_checkable
class CompilesOnDevice(Backend, Protocol):
    """An engine that is compiled on the device that it is for."""

    def cannot_compile(self, target: Target) -> str | None:
        """Why nothing can be compiled for `target` on this machine, with what would help, or None. Never raises."""
        ...


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
