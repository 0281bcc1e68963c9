"""A program on the compiled kernels: a graph without state, and a decoder that keeps its KV cache in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.export.graph import GraphSpec
from lensc.export.quantize.scheme import Scheme
from lensc.kernels.rope.reference import quantize_rows

from ._engine_cache import EngineCache, begin_step
from ._native_build import Built, build
from ._program import Program, count, split
from .base import Array, Cache, check_feeds, check_indices, check_out, writeable
from .errors import ExecutionError
from .files import map_file

F32 = npt.NDArray[np.float32]


class NativeSession:
    """See `Session`. Arrays are handed to the kernels by address, in and out."""

    def __init__(
        self, spec: GraphSpec, program: Program, folder: Path, kernels: Any, isa: str, threads: int, scheme: Scheme
    ) -> None:
        """Map the files of `program` in `folder`; `kernels` is the compiled module. Raises ExecutionError."""
        self.spec = spec
        files = {name: map_file(folder / name) for name in program.files}
        exact = scheme.activation_bits != 8
        self._built: Built | None = build(program, files, kernels, isa, threads, exact)
        self._kernels = kernels
        firsts = {split(rows)[0] for rows in self._built.row_classes}
        self._apart = firsts.pop() if len(firsts) == 1 else None
        """The dimension that all rows are apart by: slices do not see each other."""

    @property
    def memory_bytes(self) -> int:
        """What values and scratch take; weights are pages of their files."""
        return int(self._open().program.memory_bytes)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`. Raises UsageError, also for an index outside its table."""
        self._open()
        sizes = check_feeds(self.spec, feeds)
        given = {} if out is None else out
        outputs = writeable(self.spec, check_out(self.spec, sizes, given), given)
        for part_feeds, part_outputs, part_sizes in self._parts(feeds, outputs, sizes):
            self._compute(part_feeds, part_outputs, part_sizes, None, 0)
        return outputs

    def _parts(
        self, feeds: Mapping[str, Array], outputs: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array], Mapping[str, int]]]:
        """The same run one slice at a time, if nothing but slices is asked for: what one needs stays in the cache."""
        apart = self._apart
        if apart is None or apart not in sizes:
            yield feeds, outputs, sizes
            return
        in_parts = {t.name for t in self.spec.inputs + self.spec.outputs if t.shape[:1] == (apart,)}
        for i in range(sizes[apart]):
            mine, made = (
                {name: array[i : i + 1] if name in in_parts else array for name, array in arrays.items()}
                for arrays in (feeds, outputs)
            )
            yield mine, made, {**sizes, apart: 1}

    def close(self) -> None:
        """End the threads and let go of the files."""
        self._built = None

    def _open(self) -> Built:
        if self._built is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        return self._built

    def _compute(
        self,
        feeds: Mapping[str, Array],
        outputs: Mapping[str, Array],
        sizes: Mapping[str, int],
        cache: NativeCache | None,
        past: int,
    ) -> None:
        built = self._open()
        arrays = [np.ascontiguousarray(feeds[name]) for name in built.arrays]
        for name, array in zip(built.arrays, arrays, strict=True):
            if name in built.limits:
                limit = built.limits[name]
                check_indices(self.spec, name, array, sizes[limit] if isinstance(limit, str) else limit)
        values = [(value, np.ascontiguousarray(feeds[name])) for name, value in built.inputs.items()]
        values += [(value, outputs[name]) for name, value in built.outputs.items()]
        counts = [count(rows, sizes) for rows in built.row_classes]
        if 0 in counts:
            return
        caches = None if cache is None else cache.bound(self._kernels)
        batch, tokens = (0, 0) if cache is None else (cache.batch, sizes["tokens"])
        try:
            built.program.run(counts, values, arrays, caches, past, batch, tokens)
        except (RuntimeError, ValueError) as error:  # what C++ throws, so that another device goes on
            raise ExecutionError(f"graph {self.spec.name}: the kernels failed: {error}") from error


class NativeCache(EngineCache):
    """See `Cache`. Keys, rotated, and values in float32, float16, or int8 with a scale per head and token."""

    _bound: tuple[int, Any] | None = None

    def bound(self, kernels: Any) -> Any:
        """The arrays as the kernels see them, made anew when they have grown."""
        if self._bound is None or self._bound[0] != self.growths:
            arrays, layers = self.arrays, len(self.names)
            self._bound = self.growths, kernels.Caches(
                arrays[0:layers:2], arrays[1:layers:2], arrays[layers::2], arrays[layers + 1 :: 2]
            )  # fmt: skip
        return self._bound[1]

    def fill(self, rows: Mapping[str, Array]) -> None:
        """Hold the tokens of `rows`, float32[tokens, batch, kv_heads, head_dim] by name."""
        for i, name in enumerate(self.names):
            new = rows[name].transpose(1, 2, 0, 3)
            self.length = new.shape[2]
            if self.scaled:
                new, scales = quantize_rows(new)
                self.arrays[len(self.names) + i][:, :, : self.length] = scales
            self.arrays[i][:, :, : self.length] = new

    def rows(self, i: int, start: int) -> F32:
        """The rows of array i from `start` on: float32[tokens, batch, kv_heads, head_dim]."""
        stored = self.arrays[i][:, :, start : self.length].astype(np.float32)
        if self.scaled:
            stored *= self.arrays[len(self.names) + i][:, :, start : self.length, None]
        return np.asarray(stored.transpose(2, 0, 1, 3), np.float32)


class NativeDecoderSession(NativeSession):
    """See `CachedSession`."""

    caches_outlive_session = True

    def __init__(
        self,
        spec: GraphSpec,
        program: Program,
        folder: Path,
        kernels: Any,
        isa: str,
        threads: int,
        scheme: Scheme,
        prefill_chunk: int,
    ) -> None:
        super().__init__(spec, program, folder, kernels, isa, threads, scheme)
        self.prefill_chunk = prefill_chunk
        held = {8: np.int8, 16: np.float16}.get(scheme.kv_bits or 0)
        self._dtype = held or (np.float16 if scheme.activation_bits == 8 else np.float32)
        self._step_spec = spec.stateless

    def new_cache(self, capacity: int, batch: int = 1) -> NativeCache:
        """See `CachedSession.new_cache`."""
        return NativeCache(self.spec, capacity, batch, self._dtype, self._dtype is np.int8)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        self._open()
        held, sizes, outputs = begin_step(self.spec, self._step_spec, feeds, cache, NativeCache, out)
        held.reserve(sizes["tokens"])
        self._compute(feeds, outputs, sizes, held, held.length)
        held.length += sizes["tokens"]
        return outputs

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Session.run`: the past is put into a new cache, the new rows are taken out of it."""
        self._open()
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        cache = self.new_cache(max(1, sizes["past"] + sizes["tokens"]), sizes["batch"])
        cache.fill(feeds)
        stateless = {t.name: feeds[t.name] for t in self._step_spec.inputs}
        outputs = self.step(
            stateless, cache, {t.name: given[t.name] for t in self._step_spec.outputs if t.name in given}
        )
        news = writeable(self.spec, {pair.output: shapes[pair.output] for pair in self.spec.states}, given)
        for i, pair in enumerate(self.spec.states):
            news[pair.output][:] = cache.rows(i, sizes["past"])
        outputs |= news
        return {t.name: outputs[t.name] for t in self.spec.outputs}
