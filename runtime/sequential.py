"""One graph at a time: vision is loaded, pictures are encoded, vision is released, then the decoder is loaded.

So memory holds the larger of the two and not their sum, at the price of loading one again when a new picture comes. What a
graph takes is estimated from its artifact's files before anything is loaded. Only for graphs on the CPU: elsewhere weights do
not lie in the memory that is limited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from lensc.backends.base import Array, Cache, CachedSession, Session
from lensc.backends.bundle import DecoderSpec, Manifest
from lensc.backends.errors import MemoryLimitError, UsageError
from lensc.export.graph import GraphSpec

from .plan import Plan

WORK_BYTES = 300 << 20
"""Interpreter, tokenizer, buffers: at full size vision takes 203 MB beyond its files, with ten slices of 448 x 448."""
TOKENS = 2048
"""Of a conversation that is to have room: keys and values in float32, the most that an engine holds."""


class Load(NamedTuple):
    """A graph that was loaded, from when to when of `time.perf_counter`."""

    graph: str
    start_s: float
    end_s: float

    @property
    def ms(self) -> float:
        """How long it took."""
        return (self.end_s - self.start_s) * 1e3


def fits_at_once(manifest: Manifest, plan: Plan, limit_bytes: int) -> bool:
    """Whether all graphs have room together; False if only one at a time does.

    Raises MemoryLimitError with both numbers if not even that, or if a graph that would have to be released does not run on
    the CPU.
    """
    files = {p.graph: sum(file.bytes for file in p.artifact.files) for p in plan.placements}
    files["decoder"] += _cache_bytes(manifest.model.decoder)
    at_once, in_turn = (WORK_BYTES + total for total in (sum(files.values()), max(files.values())))
    if at_once <= limit_bytes:
        return True
    need = f"all graphs at once take about {_shown(at_once)}, one at a time {_shown(in_turn)}"
    need += f" (artifacts, {min(TOKENS, manifest.model.decoder.context_length)} tokens of KV cache and {_shown(WORK_BYTES)})"
    if in_turn > limit_bytes:
        raise MemoryLimitError(
            f"max_memory {_shown(limit_bytes)}: {need}; give it more, or build a smaller bundle: lensc build --scheme int4"
        )
    elsewhere = [str(p.effective) for p in plan.placements if p.effective.processor != "cpu"]
    if elsewhere:
        raise MemoryLimitError(
            f"max_memory {_shown(limit_bytes)}: {need}, and {', '.join(elsewhere)} cannot take turns: only graphs on the cpu can"
        )
    return False


def _cache_bytes(decoder: DecoderSpec) -> int:
    tokens = min(TOKENS, decoder.context_length)
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 4 * tokens


def _shown(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.0f} MB"


class Turns:
    """Graphs of which one is open. Runs of all of them take turns: none is closed under a run."""

    def __init__(self, open_graph: Callable[[str], Session]) -> None:
        """`open_graph` loads a graph by name."""
        self.lock = threading.RLock()
        self.on_release: Callable[[Session], None] = lambda session: None
        """Told what is closed, before it is."""
        self.caches_outlive_decoder = True
        """Whether KV caches are good for the next session of the decoder; an engine's own may not be."""
        self._open_graph = open_graph
        self._opened: tuple[str, Session] | None = None
        self._loads: list[Load] = []
        self._load_ms: dict[str, float] = {}
        self._closed = False

    def opened(self, name: str) -> Session:
        """The graph `name`, loaded if it is not; another one is released before. Hold the lock while it is used."""
        if self._closed:
            raise UsageError("the model is closed; load it again")
        if self._opened is None or self._opened[0] != name:
            self.release()
            started = time.perf_counter()
            self._opened = name, self._open_graph(name)
            self._loads.append(Load(name, started, time.perf_counter()))
            self._load_ms[name] = self._loads[-1].ms
        return self._opened[1]

    def release(self) -> None:
        """Close what is open."""
        with self.lock:
            if self._opened is not None:
                session = self._opened[1]
                self._opened = None
                self.on_release(session)
                session.close()

    def load_ms(self, encodes: bool) -> float:
        """What loading will take for an answer, as it took the last time; `encodes`: whether it needs vision, too."""
        opened = None if self._opened is None else self._opened[0]
        needed = {"vision", "decoder"} if encodes and opened != "vision" else {"decoder"} - {opened}
        return sum(self._load_ms.get(name, 0.0) for name in needed)

    def loads(self) -> list[Load]:
        """What was loaded since this was last asked."""
        with self.lock:
            loads, self._loads = self._loads, []
        return loads

    def close(self) -> None:
        """For good."""
        with self.lock:
            self._closed = True
            self.release()


class InTurn:
    """A session of a graph that is opened when it is run. Closing it closes all that it takes turns with."""

    def __init__(self, turns: Turns, spec: GraphSpec) -> None:
        self.spec = spec
        self._turns = turns

    def ready(self) -> None:
        """Load the graph, so that the next run does not."""
        with self._turns.lock:
            self._turns.opened(self.spec.name)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`."""
        with self._turns.lock:
            return self._turns.opened(self.spec.name).run(feeds, out)

    def close(self) -> None:
        """See `Session.close`."""
        self._turns.close()


class CachedInTurn(InTurn):
    """The same for an engine that keeps the KV cache; caches in the host's memory outlive their session."""

    def __init__(self, turns: Turns, spec: GraphSpec, prefill_chunk: int) -> None:
        super().__init__(turns, spec)
        self.prefill_chunk = prefill_chunk

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """See `CachedSession.new_cache`."""
        with self._turns.lock:
            return self._session().new_cache(capacity, batch)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`."""
        with self._turns.lock:
            return self._session().step(feeds, cache, out)

    def _session(self) -> CachedSession:
        return cast(CachedSession, self._turns.opened(self.spec.name))


def in_turn(turns: Turns, specs: Mapping[str, GraphSpec]) -> dict[str, Session]:
    """A session for every graph. Each is loaded once, which finds what is wrong with it; the first, vision, stays."""
    made: dict[str, Session] = {}
    for name in sorted(specs, key=lambda name: name == "vision"):
        made[name] = one_in_turn(turns, specs[name])
    turns.loads()
    return made


def one_in_turn(turns: Turns, spec: GraphSpec) -> Session:
    """A session for the graph of `spec`, which is loaded for it."""
    with turns.lock:
        opened: Any = turns.opened(spec.name)
        cached = isinstance(opened, CachedSession)
        if spec.name == "decoder":
            turns.caches_outlive_decoder = not cached or getattr(opened, "caches_outlive_session", False)
        return CachedInTurn(turns, spec, opened.prefill_chunk) if cached else InTurn(turns, spec)
