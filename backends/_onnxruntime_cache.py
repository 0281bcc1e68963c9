"""A lowered decoder on ONNX Runtime: GroupQueryAttention appends to its cache in place.

Layout of the cache: per layer one key and one value array [batch, kv_heads, capacity, head_dim] of float32, or of int8
with `OrtCache.scales`. The same array is bound as past and as present, which tells the operator that both share a buffer;
it then reads the rows below `seqlens_k` and writes behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from lensc.export.graph import GraphSpec

from ._engine_cache import EngineCache, begin_step
from ._onnxruntime_kv import dequantize, quantize, scales_of
from ._onnxruntime_lower import LENGTHS, NEW_SCALES, SCALES, TOTAL, WIDEN, present_name
from ._onnxruntime_session import Weights, engine_errors
from .base import Array, Cache, check_feeds, check_out, writeable
from .errors import ExecutionError, UsageError

F32 = npt.NDArray[np.float32]


class OrtCache(EngineCache):
    """See `Cache`. `arrays` hold float32, or int8 with `scales`."""

    def __init__(self, spec: GraphSpec, capacity: int, batch: int, int8: bool = False) -> None:
        super().__init__(spec, capacity, batch, np.int8 if int8 else np.float32)
        channels = math.prod(int(d) for d in spec.input(self.names[0]).shape[2:])
        self.scales: F32 | None = np.zeros((len(self.names), channels), np.float32) if int8 else None
        """Of the channels of each array, set by the first tokens of a sequence; None in float32."""

    def fork(self, batch: int) -> Self:
        """See `Cache.fork`."""
        copy = super().fork(batch)
        if self.scales is not None and copy.scales is not None:
            copy.scales[:] = self.scales
        return copy

    def save(self) -> dict[str, Array]:
        """See `Cache.save`."""
        saved = super().save()
        return saved if self.scales is None else saved | {SCALES: self.scales}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """See `Cache.restore`."""
        if self.scales is None:
            super().restore(arrays)
            return
        scales = arrays.get(SCALES)
        if scales is None or scales.dtype != np.float32 or scales.shape != self.scales.shape:
            raise UsageError(f"KV cache: no scales of float32{list(self.scales.shape)}, which an int8 cache has")
        super().restore({name: array for name, array in arrays.items() if name != SCALES})
        self.scales[:] = scales

    def _like(self, batch: int) -> Self:
        return type(self)(self.spec, self.capacity, batch, self.scales is not None)

    def fill(self, rows: Mapping[str, Array]) -> None:
        """Hold the tokens of `rows`, float32[tokens, batch, kv_heads, head_dim] by name; scales become wide enough."""
        for i, name in enumerate(self.names):
            new = stored = rows[name]
            if self.scales is not None and len(new):
                self.scales[i] = np.maximum(self.scales[i], scales_of(new, is_key=name.startswith("past_key")))
                stored = quantize(new, self.scales[i])
            self.arrays[i][:, :, : len(new)] = stored.transpose(1, 2, 0, 3)
            self.length = len(new)

    def rows(self, i: int, start: int) -> F32:
        """The rows of array i from `start` on: float32[tokens, batch, kv_heads, head_dim]."""
        stored = self.arrays[i][:, :, start : self.length].transpose(2, 0, 1, 3)
        return stored if self.scales is None else dequantize(stored, self.scales[i])


@dataclass(frozen=True)
class _Bound:
    """A cache's arrays, bound as past and present, with the two inputs that say how far they are filled.

    The engine keeps addresses, and is only ever run with those of arrays that are alive: of the cache being stepped.
    """

    binding: Any
    lengths: npt.NDArray[np.int32]
    total: npt.NDArray[np.int32]
    widen: npt.NDArray[np.bool_]
    growths: int


class OrtDecoderSession:
    """See `CachedSession`. `spec` is that of the portable graph; the engine's inputs differ by its cache."""

    caches_outlive_session = True

    def __init__(self, spec: GraphSpec, session: Any, weights: Weights, shrinking: Any, prefill_chunk: int) -> None:
        """`weights` must outlive `session`; `shrinking` are the options of a prefill, whose buffers are not kept."""
        self.spec = spec
        self.prefill_chunk = prefill_chunk
        self._shrinking = shrinking
        self._session: Any = session
        self._weights: Weights | None = weights
        self._bound: WeakKeyDictionary[OrtCache, _Bound] = WeakKeyDictionary()
        states = {pair.input for pair in spec.states}
        self._fed = tuple(t for t in spec.inputs if t.name not in states and t.name in _names(session.get_inputs()))
        self._int8 = SCALES in _names(session.get_inputs())
        self._names = tuple((pair.input, present_name(pair.input)) for pair in spec.states)
        self._step_spec = spec.stateless

    def new_cache(self, capacity: int, batch: int = 1) -> OrtCache:
        """See `CachedSession.new_cache`."""
        return OrtCache(self.spec, capacity, batch, self._int8)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        if isinstance(cache, OrtCache) and cache.length == 0 and cache.scales is not None:
            cache.scales[:] = 0
        return self._step(feeds, cache, out, widen=cache.length == 0)

    def _step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None, widen: bool
    ) -> dict[str, Array]:
        """`widen`: the scales of an int8 cache, which holds nothing that they stand for, become those of `feeds`."""
        if self._session is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        held, sizes, outputs = begin_step(self.spec, self._step_spec, feeds, cache, OrtCache, out)
        tokens, past = sizes["tokens"], held.length
        held.reserve(tokens)
        inputs = {t.name: np.ascontiguousarray(feeds[t.name]) for t in self._fed}
        if held.batch > 1 and tokens > 1 and past:
            # the operator takes several new tokens of several sequences only while the cache is empty
            for i in range(held.batch):
                self._run_one(i, inputs, outputs, held, past + tokens, widen)
        else:
            self._run(inputs, outputs, self._binding_of(held), past + tokens, widen)
        held.length = past + tokens
        return outputs

    def _binding_of(self, cache: OrtCache) -> _Bound:
        """What is bound to `cache`, made once: binding 64 arrays anew takes 0.4 ms, in every step."""
        bound = self._bound.get(cache)
        if bound is None or bound.growths != cache.growths:
            bound = self._bound[cache] = self._bind(cache.arrays, cache.scales, cache.growths)
        return bound

    def _bind(self, arrays: Sequence[Array], scales: F32 | None, growths: int = 0) -> _Bound:
        batch = len(arrays[0])
        lengths, total, widen = np.empty(batch, np.int32), np.empty((), np.int32), np.empty((), np.bool_)
        bound = _Bound(self._session.io_binding(), lengths, total, widen, growths)
        for (past, present), array in zip(self._names, arrays, strict=True):
            _bind_input(bound.binding, past, array)
            _bind_output(bound.binding, present, array)
        if scales is not None:
            # read at the start of a run, written at its end
            _bind_input(bound.binding, SCALES, scales.reshape(-1))
            _bind_output(bound.binding, NEW_SCALES, scales.reshape(-1))
            _bind_input(bound.binding, WIDEN, bound.widen)
        _bind_input(bound.binding, LENGTHS, bound.lengths)
        _bind_input(bound.binding, TOTAL, bound.total)
        return bound

    def _run_one(
        self,
        i: int,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        cache: OrtCache,
        total: int,
        widen: bool,
    ) -> None:
        """Run sequence i of the batch alone."""
        of_batch = {t.name for t in self._step_spec.inputs + self._step_spec.outputs if t.shape[:1] == ("batch",)}
        mine = {n: a[i : i + 1] if n in of_batch else a for n, a in inputs.items()}
        made = {n: a[i : i + 1] for n, a in outputs.items()}
        self._run(mine, made, self._bind([array[i : i + 1] for array in cache.arrays], cache.scales), total, widen)

    def _run(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], bound: _Bound, total: int, widen: bool
    ) -> None:
        """Run once; `total` tokens are in the cache afterwards."""
        bound.lengths[:] = total - 1
        bound.total[()] = total
        bound.widen[()] = widen
        with engine_errors(f"graph {self.spec.name}"):
            for name, array in inputs.items():
                _bind_input(bound.binding, name, array)
            for name, array in outputs.items():
                _bind_output(bound.binding, name, array)
            is_prefill = inputs["inputs_embeds"].shape[1] > 1
            self._session.run_with_iobinding(bound.binding, self._shrinking if is_prefill else None)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`: the past is put into a new cache, the new rows are taken out of it.

        In int8 it takes two runs if there is a past: what scales the new tokens need is known after one.
        """
        if self._session is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        past, tokens = sizes["past"], sizes["tokens"]
        cache = self.new_cache(past + tokens, sizes["batch"])
        stateless = {t.name: feeds[t.name] for t in self._step_spec.inputs}
        wanted = {t.name: given[t.name] for t in self._step_spec.outputs if t.name in given}
        cache.fill(feeds)
        if self._int8 and past:
            self._step(stateless, cache, wanted, widen=True)
            cache.fill(feeds)
        outputs = self._step(stateless, cache, wanted, widen=past == 0)
        news = writeable(self.spec, {pair.output: shapes[pair.output] for pair in self.spec.states}, given)
        for i, pair in enumerate(self.spec.states):
            news[pair.output][:] = cache.rows(i, past)
        outputs |= news
        return {t.name: outputs[t.name] for t in self.spec.outputs}

    def close(self) -> None:
        """Free the engine's session, then the weights that it borrows."""
        self._bound.clear()
        self._session = self._weights = None


def _bind_input(binding: Any, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _names(values: Any) -> set[str]:
    return {value.name for value in values}
