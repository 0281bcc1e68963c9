"""Sessions that several answers use at once, until one of them finds that the device has failed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from lensc.backends.base import Array, Cache, CachedSession, Session
from lensc.backends.errors import ExecutionError, LensError, UsageError

from .costs import Curve
from .prefix_cache import PrefixCache
from .speculation import Pace

CLOSED = "the model is closed; load it again"


class SharedSession:
    """A session that several generations use: their runs take turns, and fail with a clear error once it is closed."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self._session: Session | None = session
        self._lock = threading.Lock()
        self._why: LensError = UsageError(CLOSED)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`."""
        with self._lock:
            return self._opened().run(feeds, out)

    def close(self) -> None:
        """See `Session.close`; again does nothing."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def give_up(self, why: str) -> Session | None:
        """Let go of what has failed; it is the caller's to close. Whoever still runs it gets an ExecutionError, and asks for
        what came in its place.
        """
        self._why = ExecutionError(why)
        with self._lock:
            session, self._session = self._session, None
        return session

    def _opened(self) -> Session:
        if self._session is None:
            raise self._why
        return self._session


class SharedCachedSession(SharedSession):
    """The same for an engine that keeps the KV cache; each generation has a cache of its own."""

    def __init__(self, session: CachedSession) -> None:
        super().__init__(session)
        self.prefill_chunk = session.prefill_chunk

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """See `CachedSession.new_cache`."""
        with self._lock:
            return cast(CachedSession, self._opened()).new_cache(capacity, batch)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`."""
        with self._lock:
            return cast(CachedSession, self._opened()).step(feeds, cache, out)


def shared(session: Session) -> SharedSession:
    """`session` for several generations at once."""
    return SharedCachedSession(session) if isinstance(session, CachedSession) else SharedSession(session)


@dataclass(frozen=True, eq=False)
class LoadedDecoder:
    """A decoder on its device, and what belongs to it alone: KV caches of earlier answers, and how fast it is."""

    session: SharedSession
    prefixes: PrefixCache
    pace: Pace
    prefill_ms: Curve = field(default_factory=Curve)
    """Of a piece of a prompt, by its tokens."""
