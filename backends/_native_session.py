"""A program on the compiled kernels: a graph without state, and a decoder that keeps its KV cache in place."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.export.graph import GraphSpec
from lensc.export.quantize.scheme import Scheme

from ._engine_cache import EngineCache
from ._native_build import Built, build
from ._native_program import Program, count, split
from .base import Array, Cache, check_feeds, check_out
from .errors import ExecutionError, UsageError

F32 = npt.NDArray[np.float32]


class NativeSession:
    """See `Session`. Arrays are handed to the kernels by address, in and out."""

    def __init__(
        self, spec: GraphSpec, program: Program, folder: Path, kernels: Any, isa: str, threads: int, scheme: Scheme
    ) -> None:
        """Map the files of `program` in `folder`; `kernels` is the compiled module. Raises ExecutionError."""
        self.spec = spec
        files = {name: _map(folder / name) for name in program.files}
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
        shapes = check_out(self.spec, sizes, given)
        outputs = {
            t.name: given[t.name] if t.name in given else np.empty(shapes[t.name], t.dtype) for t in self.spec.outputs
        }
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
            self._check_indices(name, array, built.limits.get(name), sizes)
        values = [(value, np.ascontiguousarray(feeds[name])) for name, value in built.inputs.items()]
        values += [(value, outputs[name]) for name, value in built.outputs.items()]
        counts = [count(rows, sizes) for rows in built.row_classes]
        if 0 in counts:
            return
        caches = None if cache is None else cache.bound(self._kernels)
        batch, tokens = (0, 0) if cache is None else (cache.batch, sizes["tokens"])
        built.program.run(counts, values, arrays, caches, past, batch, tokens)

    def _check_indices(self, name: str, array: Array, limit: int | str | None, sizes: Mapping[str, int]) -> None:
        """Kernels check nothing. `limit`: the rows there are, or the dimension that says so; None: no indices."""
        if limit is None or not array.size:
            return
        rows = sizes[limit] if isinstance(limit, str) else limit
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0 or highest >= rows:
            found = lowest if lowest < 0 else highest
            raise UsageError(f"graph {self.spec.name}: {name} has {found}, expected 0 to {rows - 1}")


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
                scales = np.abs(new).max(-1, initial=0) / np.float32(127)
                quotients = np.divide(new, scales[..., None], where=scales[..., None] > 0, out=np.zeros_like(new))
                new = np.clip(np.rint(quotients), -127, 127)
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

    prefill_chunk = 256
    """Weights pass once for 128 tokens; more at once is a little better for attention and takes memory."""

    def __init__(
        self, spec: GraphSpec, program: Program, folder: Path, kernels: Any, isa: str, threads: int, scheme: Scheme
    ) -> None:
        super().__init__(spec, program, folder, kernels, isa, threads, scheme)
        held = {8: np.int8, 16: np.float16}.get(scheme.kv_bits or 0)
        self._dtype = held or (np.float16 if scheme.activation_bits == 8 else np.float32)
        states = {pair.input for pair in spec.states} | {pair.output for pair in spec.states}
        self._step_spec = GraphSpec(
            spec.name,
            tuple(t for t in spec.inputs if t.name not in states),
            tuple(t for t in spec.outputs if t.name not in states),
            (),
            spec.dims,
        )

    def new_cache(self, capacity: int, batch: int = 1) -> NativeCache:
        """See `CachedSession.new_cache`."""
        return NativeCache(self.spec, capacity, batch, self._dtype, self._dtype is np.int8)

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """See `CachedSession.step`. Positions must continue those in the cache."""
        self._open()
        if not isinstance(cache, NativeCache):
            raise UsageError(f"graph {self.spec.name}: {type(cache).__name__} is not a cache of this session")
        sizes = check_feeds(self._step_spec, feeds)
        given = {} if out is None else out
        shapes = check_out(self._step_spec, sizes, given)
        self._check_positions(feeds["position_ids"], sizes["batch"], cache)
        outputs = {
            t.name: given[t.name] if t.name in given else np.empty(shapes[t.name], t.dtype)
            for t in self._step_spec.outputs
        }
        cache.reserve(sizes["tokens"])
        self._compute(feeds, outputs, sizes, cache, cache.length)
        cache.length += sizes["tokens"]
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
        for i, pair in enumerate(self.spec.states):
            rows = given[pair.output] if pair.output in given else np.empty(shapes[pair.output], np.float32)
            rows[:] = cache.rows(i, sizes["past"])
            outputs[pair.output] = rows
        return {t.name: outputs[t.name] for t in self.spec.outputs}

    def _check_positions(self, positions: Array, batch: int, cache: NativeCache) -> None:
        if batch != cache.batch:
            raise UsageError(f"graph {self.spec.name}: {batch} sequences fed, the cache has {cache.batch}")
        first = cache.length
        if not np.array_equal(positions, np.arange(first, first + len(positions))):
            raise UsageError(
                f"graph {self.spec.name}: position_ids {positions[:8].tolist()}, expected "
                f"{first} to {first + len(positions) - 1}: this engine appends to its cache"
            )


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise ExecutionError(f"{path}: cannot be read: {reason}; build the bundle again") from error
