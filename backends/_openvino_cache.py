"""A lowered decoder on OpenVINO: the engine keeps keys and values in the states of an infer request.

Every cache is an infer request of its own; all share the compiled model and its weights. The CPU's plugin stores a
state as [tokens, batch, kv_heads, head_dim] in the KV cache's precision and doubles its room when it is full. Sequences
are reordered by an index that goes with the next run, so `fork` to a batch and `reorder` copy nothing by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.export.graph import GraphSpec

from ._engine_cache import begin_step
from ._openvino_lower import BEAMS, PAST
from ._openvino_session import Weights, bind, engine, engine_errors, readable
from .base import (
    Array,
    Cache,
    check_feeds,
    check_fork,
    check_out,
    check_reorder,
    check_restored,
    check_trim,
    writeable,
)
from .errors import ExecutionError, PromptError, UsageError

KV_BYTES = {"f32": (4, 0), "f16": (2, 0), "bf16": (2, 0), "u8": (1, 8)}
"""Bytes of a stored value, and of the scale and zero point of a row of them, by KV_CACHE_PRECISION."""


class OpenVINOCache:
    """See `Cache`."""

    def __init__(self, spec: GraphSpec, request: Any, batch: int, kv_precision: str) -> None:
        self.batch = batch
        self.length = 0
        self.request = request
        self.beams = np.arange(batch, dtype=np.int32)
        """Which sequence of the states each sequence of the next run continues."""
        self.whole = True
        """Whether all layers hold the same tokens: not after a run that failed half way."""
        self._spec = spec
        self._kv_precision = kv_precision
        self._reserved = 0

    @property
    def nbytes(self) -> int:
        """See `Cache.nbytes`: as the CPU's plugin reserves, which does not tell."""
        return self._row_bytes * self._reserved

    @property
    def used_bytes(self) -> int:
        """See `Cache.used_bytes`."""
        return self._row_bytes * self.length

    @property
    def _row_bytes(self) -> int:
        """Bytes of one token of all sequences."""
        kv_heads, head_dim = (int(d) for d in self._spec.input(self._spec.states[0].input).shape[2:])
        of_value, of_row = KV_BYTES[self._kv_precision]
        return len(self._spec.states) * self.batch * kv_heads * (head_dim * of_value + of_row)

    def trim(self, length: int) -> None:
        """See `Cache.trim`. Copies what is kept: the engine cannot shorten a state."""
        check_trim(self, length)
        if length == self.length:
            return
        self.put({name: array[:, :, :length] for name, array in self.take().items()} if length else {})
        if not length:
            self.beams = np.arange(self.batch, dtype=np.int32)
        self.length = length

    def fork(self, batch: int) -> OpenVINOCache:
        """See `Cache.fork`."""
        check_fork(self)
        if batch < 1:
            raise UsageError(f"KV cache: batch {batch}, expected at least 1")
        request = self.request.get_compiled_model().create_infer_request()
        copy = OpenVINOCache(self._spec, request, batch, self._kv_precision)
        if self.length:
            copy.put(self.take())
            copy.beams = np.zeros(batch, np.int32)
        copy.length, copy._reserved = self.length, self._reserved
        return copy

    def reorder(self, beams: npt.NDArray[np.int64], start: int) -> None:
        """See `Cache.reorder`. Takes effect with the next run; rows before `start` are equal and may move, too."""
        check_reorder(self, beams)
        if self.length:
            self.beams = self.beams[beams]

    def save(self) -> dict[str, Array]:
        """See `Cache.save`: float32[batch, kv_heads, tokens, head_dim] by name, from which the engine rounds as before."""
        saved = self.take() if self.length else self._nothing()
        if not np.array_equal(self.beams, np.arange(self.batch)):
            saved = {name: array[self.beams] for name, array in saved.items()}
        return saved

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """See `Cache.restore`."""
        length = check_restored(self._nothing(), arrays, 2, self._spec.dims["past"].max)
        self.put(arrays)
        self.beams, self.whole = np.arange(self.batch, dtype=np.int32), True
        self.length = 0
        self.reserve(length)
        self.length = length

    def _nothing(self) -> dict[str, Array]:
        kv_heads, head_dim = (int(d) for d in self._spec.input(self._spec.states[0].input).shape[2:])
        empty = np.empty((self.batch, kv_heads, 0, head_dim), np.float32)
        return {pair.input: empty for pair in self._spec.states}

    def reserve(self, tokens: int) -> None:
        """Count room for `tokens` more. Raises PromptError if the model's context is full."""
        needed, limit = self.length + tokens, self._spec.dims["past"].max
        if needed > limit:
            raise PromptError(
                f"{needed} tokens do not fit: context_length is {limit}; shorten the prompt or use fewer pictures"
            )
        if needed > self._reserved:
            self._reserved = 2 * needed

    def take(self) -> dict[str, Array]:
        """Every state as float32[sequences, kv_heads, tokens, head_dim], by the name of the input it stands for."""
        with engine_errors(f"graph {self._spec.name}"):
            return {state.name: state.state.data for state in self.request.query_state()}

    def put(self, arrays: Mapping[str, Array]) -> None:
        """Set every state to what `take` gave, or empty all if there is nothing."""
        with engine_errors(f"graph {self._spec.name}"):
            self.request.reset_state()
            for state in self.request.query_state() if arrays else ():
                state.state = engine().Tensor(np.ascontiguousarray(arrays[state.name]), shared_memory=True)


class OpenVINODecoderSession:
    """See `CachedSession`. `spec` is that of the portable graph; in the engine its states are no inputs."""

    def __init__(self, spec: GraphSpec, compiled: Any, weights: Weights, kv_precision: str, prefill_chunk: int) -> None:
        self.spec = spec
        self.prefill_chunk = prefill_chunk
        self._compiled: Any = compiled
        self._weights = weights
        self._kv_precision = kv_precision
        self._step_spec = spec.stateless

    def new_cache(self, capacity: int, batch: int = 1) -> OpenVINOCache:
        """See `CachedSession.new_cache`. The engine reserves by what is fed; `capacity` is only checked."""
        self._check_open()
        limit = self.spec.dims["past"].max
        if not 1 <= capacity <= limit:
            raise UsageError(f"KV cache: capacity {capacity}, expected 1 to {limit}")
        if not 1 <= batch <= self.spec.dims["batch"].max:
            raise UsageError(f"KV cache: batch {batch}, expected 1 to {self.spec.dims['batch'].max}")
        return OpenVINOCache(self.spec, self._compiled.create_infer_request(), batch, self._kv_precision)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        self._check_open()
        held, sizes, outputs = begin_step(self.spec, self._step_spec, feeds, cache, OpenVINOCache, out)
        if not held.whole:
            raise ExecutionError(f"graph {self.spec.name}: the cache is incomplete since a run failed; begin a new one")
        held.reserve(sizes["tokens"])
        inputs = {name: readable(array) for name, array in feeds.items()}
        inputs |= {BEAMS: held.beams, PAST: np.array([held.length])}
        with engine_errors(f"graph {self.spec.name}"):
            bind(held.request, inputs)
            bind(held.request, outputs)
            held.whole = False
            held.request.infer()
        held.whole = True
        self._weights.used()
        held.beams = np.arange(held.batch, dtype=np.int32)
        held.length += sizes["tokens"]
        return outputs

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`: the past is put into a new cache, the new rows are taken out of it."""
        self._check_open()
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        past, tokens = sizes["past"], sizes["tokens"]
        cache = self.new_cache(past + tokens, sizes["batch"])
        if past:
            cache.put({pair.input: feeds[pair.input].transpose(1, 2, 0, 3) for pair in self.spec.states})
            cache.length = past
        stateless = {t.name: feeds[t.name] for t in self._step_spec.inputs}
        wanted = {t.name: given[t.name] for t in self._step_spec.outputs if t.name in given}
        outputs = self.step(stateless, cache, wanted)
        states = cache.take()
        rows = writeable(self.spec, {pair.output: shapes[pair.output] for pair in self.spec.states}, given)
        for pair in self.spec.states:
            rows[pair.output][:] = states[pair.input][:, :, past:].transpose(2, 0, 1, 3)
        return {t.name: (outputs | rows)[t.name] for t in self.spec.outputs}

    def close(self) -> None:
        """Let go of the compiled model; it is freed with the last of its caches."""
        self._compiled = None

    def _check_open(self) -> None:
        if self._compiled is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
