"""Running an engine: a graph without state, and a decoder whose KV cache stays on the GPU.

What runs the graph is an `Engine`: TensorRT's own is in `_tensorrt_engine`. Feeds that are larger than an engine was compiled
for are run in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from lensc.export.graph import GraphSpec

from ._engine_cache import begin_step
from ._tensorrt_cache import Blocks, TensorRTCache
from ._tensorrt_device import Device
from ._tensorrt_target import (
    BUCKET,
    COLUMNS,
    PREFILL_TOKENS,
    SPAN,
    WRITE,
    Half,
    Profile,
    capacity_of,
    present_name,
    profiles,
)
from .base import Array, Cache, check_feeds, check_indices, check_out, writeable
from .errors import ExecutionError, UsageError

Placed = tuple[int, tuple[int, ...]]
"""Where a tensor lies, and its shape."""


class Engine(Protocol):
    """A compiled graph on a device."""

    @property
    def device(self) -> Device: ...

    def run(self, profile: int, inputs: Mapping[str, Placed], outputs: Mapping[str, Placed]) -> None:
        """Run once, in the order of the device's stream. Raises ExecutionError."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class _Buffers:
    """Memory of the device by name, as much as was ever asked for, with memory of the host to copy through."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._held: dict[str, tuple[int, int]] = {}
        self._host: dict[str, Array] = {}

    def place(self, name: str, dtype: str, shape: tuple[int, ...]) -> Placed:
        """Room for a tensor. What was there may be lost."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        address, size = self._held.get(name, (0, -1))
        if size < nbytes:
            if size >= 0:
                del self._held[name]
                self._device.free(address)
            address = self._device.allocate(nbytes)
            self._held[name] = (address, nbytes)
        return address, shape

    def send(self, name: str, array: Array) -> Placed:
        """A tensor's values, copied to the device; `array` may change afterwards."""
        placed = self.place(name, array.dtype.name, array.shape)
        through = self._through(name, array)
        np.copyto(through, array)
        self._device.copy(placed[0], array.nbytes, through.ctypes.data, array.nbytes, array.nbytes, 1)
        return placed

    def fetch(self, name: str, placed: Placed, to: Array) -> None:
        """Copy an output to the host, and wait for it."""
        through = self._through(name, to)
        self._device.copy(through.ctypes.data, to.nbytes, placed[0], to.nbytes, to.nbytes, 1)
        self._device.wait()
        np.copyto(to, through)

    def close(self) -> None:
        for address, _ in self._held.values():
            self._device.free(address)
        self._held.clear()

    def _through(self, name: str, like: Array) -> Array:
        """Memory of the host in the type and shape of `like`. Nobody writes to it before what reads it has run: a session
        fetches, and so waits, once a run.
        """
        if name not in self._host or self._host[name].nbytes < like.nbytes:
            self._host[name] = self._device.host_bytes(1 << (like.nbytes - 1).bit_length())
        return self._host[name][: like.nbytes].view(like.dtype).reshape(like.shape)


class TensorRTSession:
    """See `Session`."""

    def __init__(self, spec: GraphSpec, engine: Engine) -> None:
        """Takes `engine` over, and closes it."""
        self.spec = spec
        self._engine: Engine | None = engine
        self._profiles = profiles(spec)
        self._buffers = _Buffers(engine.device)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`. More slices than the engine takes at once are run in pieces."""
        engine = self._open()
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        outputs = writeable(self.spec, check_out(self.spec, sizes, given), given)
        start = 0
        while start < sizes["slices"]:
            which, count = self._chosen(sizes["slices"] - start, sizes["patches"])
            piece = slice(start, start + count)
            start += count
            placed = {t.name: self._buffers.send(t.name, feeds[t.name][piece]) for t in self.spec.inputs}
            parts = {t.name: outputs[t.name][piece] for t in self.spec.outputs}
            to = {name: self._buffers.place(name, part.dtype.name, part.shape) for name, part in parts.items()}
            engine.run(which, placed, to)
            for name, part in parts.items():
                self._buffers.fetch(name, to[name], part)
        return outputs

    def close(self) -> None:
        """Free the device's memory."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            self._buffers.close()
            engine.close()

    def _chosen(self, slices: int, patches: int) -> tuple[int, int]:
        """The profile for slices of so many patches, and how many of them it takes at once. Raises UsageError."""
        fitting = [(i, p) for i, p in enumerate(self._profiles) if p.takes({"patches": patches})]
        for i, profile in fitting:
            if profile.takes({"slices": slices}):
                return i, slices
        if not fitting:
            most = max(profile.sizes["patches"][2] for profile in self._profiles)
            raise UsageError(f"graph {self.spec.name}: {patches} patches, expected at most {most}")
        i, largest = max(fitting, key=lambda found: found[1].sizes["slices"][2])
        return i, largest.sizes["slices"][2]

    def _open(self) -> Engine:
        if self._engine is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        return self._engine


class TensorRTDecoderSession(TensorRTSession):
    """See `CachedSession`."""

    prefill_chunk = PREFILL_TOKENS

    def __init__(self, spec: GraphSpec, engine: Engine, half: Half) -> None:
        super().__init__(spec, engine)
        self._half = half
        self._step_spec = spec.stateless
        columns = np.arange(capacity_of(spec), dtype=np.int64)
        self._columns = self._buffers.send(COLUMNS, columns)[0]
        engine.device.wait()
        self._blocks = Blocks(engine.device)

    def new_cache(self, capacity: int, batch: int = 1) -> TensorRTCache:
        """See `CachedSession.new_cache`. It has room for the model's whole context, whatever `capacity` says."""
        most = self._profiles[0].sizes["batch"][2]
        if batch > most:
            raise UsageError(f"KV cache: batch {batch}, backend tensorrt takes at most {most}")
        self._open()
        return TensorRTCache(self.spec, self._blocks, self._half, capacity, batch)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        self._open()
        held, sizes, outputs = begin_step(self.spec, self._step_spec, feeds, cache, TensorRTCache, out)
        check_indices(self.spec, "logit_positions", feeds["logit_positions"], sizes["tokens"])
        held.reserve(sizes["tokens"])
        for start, end, rows in pieces(feeds["logit_positions"], sizes["tokens"], self._profiles[-1]):
            self._step(feeds, held, start, end, rows, outputs["logits"])
        return outputs

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`: the past is put into a new cache, the new rows are taken out of it."""
        self._open()
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        outputs = writeable(self.spec, check_out(self.spec, sizes, given), given)
        past, tokens = sizes["past"], sizes["tokens"]
        cache = self.new_cache(1, sizes["batch"])
        cache.fill({name: feeds[name] for name in cache.names})
        stateless = {t.name: feeds[t.name] for t in self._step_spec.inputs}
        self.step(stateless, cache, {t.name: outputs[t.name] for t in self._step_spec.outputs})
        for i, pair in enumerate(self.spec.states):
            outputs[pair.output][:] = cache.rows(i, past, past + tokens)
        return outputs

    def close(self) -> None:
        """Free the device's memory, but for what caches hold that are still in use."""
        if self._engine is not None:
            self._blocks.close()
        super().close()

    def _step(
        self, feeds: Mapping[str, Array], cache: TensorRTCache, start: int, end: int, rows: Array, logits: Array
    ) -> None:
        """Run the tokens from `start` to `end`; `rows` are those of `logits` that they give."""
        past, tokens, batch = cache.length, end - start, cache.batch
        picked = feeds["logit_positions"][rows] - start if len(rows) else np.zeros(1, np.int64)
        span = min(capacity_of(self.spec), -(-(past + tokens) // BUCKET) * BUCKET)
        sizes = {"batch": batch, "tokens": tokens, "rows": len(picked), SPAN: span}
        which = next(i for i, profile in enumerate(self._profiles) if profile.takes(sizes))
        inputs = {
            "inputs_embeds": self._buffers.send("inputs_embeds", feeds["inputs_embeds"][:, start:end]),
            "position_ids": self._buffers.send("position_ids", feeds["position_ids"][start:end]),
            "logit_positions": self._buffers.send("logit_positions", picked),
            WRITE: self._buffers.send(WRITE, np.full(batch, past, np.int64)),
            COLUMNS: (self._columns, (span,)),
        }
        made = np.empty((batch, len(picked), logits.shape[-1]), np.float32)
        outputs = {"logits": self._buffers.place("logits", "float32", made.shape)}
        for i, name in enumerate(cache.names):
            inputs[name] = outputs[present_name(name)] = (cache.address(i), cache.shape)
        self._open().run(which, inputs, outputs)
        self._buffers.fetch("logits", outputs["logits"], made)
        if len(rows):
            logits[:, rows] = made
        cache.length = past + tokens


def pieces(positions: Array, tokens: int, largest: Profile) -> Iterator[tuple[int, int, Array]]:
    """`tokens` cut so that a run of each piece fits `largest`: start, end, and which of `positions` are in it.

    Raises UsageError for more rows of one token than it takes.
    """
    most_tokens, most_rows = largest.sizes["tokens"][2], largest.sizes["rows"][2]
    start = 0
    while start < tokens:
        end = min(tokens, start + most_tokens)
        counts = np.bincount(positions[(positions >= start) & (positions < end)] - start, minlength=end - start)
        end = start + int((np.cumsum(counts) <= most_rows).sum())
        if end == start:
            raise UsageError(f"logit_positions: {counts[0]} times {start}, expected at most {most_rows} times")
        yield start, end, np.flatnonzero((positions >= start) & (positions < end))
        start = end
