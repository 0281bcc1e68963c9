"""Threads of an engine that stay on the fastest cores: the setting `cores` of engines on the CPU.

A thread inherits where it may run from the one that starts it (Linux). So an engine is loaded while the calling thread may
run on these cores only, and run likewise; the caller is put back afterwards. One hardware thread of each core is taken, the
fastest cores first: where cores differ, or have two threads each, the system may put a thread where another one waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lensc.export.graph import GraphSpec
from lensc.profiles import probe

from .base import Array, Cache, CachedSession, Session

ANY, FASTEST = "any", "fastest"


def choices() -> dict[str, tuple[str, ...]]:
    """The setting, where there is a choice: cores that differ, or have several threads."""
    here = probe.machine()
    differs = here.threads > here.cores or len(set(probe.core_speeds().values())) > 1
    return {"cores": (ANY, FASTEST)} if differs and hasattr(os, "sched_setaffinity") else {}


def cpus_of(chosen: Mapping[str, str], threads: int) -> tuple[int, ...]:
    """The hardware threads that so many threads stay on; none if they may run anywhere, or are more than there are cores."""
    cores = list(probe.core_speeds())
    return tuple(cores[:threads]) if chosen.get("cores") == FASTEST and threads <= len(cores) else ()


@contextmanager
def staying_on(cpus: Sequence[int]) -> Iterator[None]:
    """While inside, the calling thread, and those that it starts, run on `cpus` only; anywhere if there are none."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def on_cores(session: Session, cpus: Sequence[int]) -> Session:
    """`session`, run on `cpus`; itself if there are none."""
    if not cpus:
        return session
    return CachedOnCores(session, cpus) if isinstance(session, CachedSession) else OnCores(session, cpus)


class OnCores:
    """A session whose caller runs on some cores for the length of a call."""

    def __init__(self, session: Session, cpus: Sequence[int]) -> None:
        self._session, self._cpus = session, cpus

    @property
    def spec(self) -> GraphSpec:
        """See `Session.spec`."""
        return self._session.spec

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`."""
        with staying_on(self._cpus):
            return self._session.run(feeds, out)

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()


class CachedOnCores(OnCores):
    """The same for an engine that keeps the KV cache in the host's memory."""

    caches_outlive_session = True

    def __init__(self, session: CachedSession, cpus: Sequence[int]) -> None:
        super().__init__(session, cpus)
        self._cached = session
        self.prefill_chunk = session.prefill_chunk

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """See `CachedSession.new_cache`."""
        return self._cached.new_cache(capacity, batch)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`."""
        with staying_on(self._cpus):
            return self._cached.step(feeds, cache, out)
