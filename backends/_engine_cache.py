"""A KV cache that an engine appends to in place: per layer one key and one value array, time behind the heads."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from lensc.export.graph import GraphSpec

from .base import (
    Array,
    Cache,
    check_capacity,
    check_continues,
    check_feeds,
    check_fork,
    check_out,
    check_reorder,
    check_restored,
    check_trim,
    writeable,
)
from .errors import PromptError, UsageError

MAPPED_BYTES = 1 << 20
"""Arrays from this size on have pages of their own: those of tokens to come take no memory, and all go back to the system
with the array. From the heap 1024 tokens of a full-size model took 90 MB more, in huge pages and in gaps."""


C = TypeVar("C", bound=Cache)


def begin_step(
    spec: GraphSpec,
    step_spec: GraphSpec,
    feeds: Mapping[str, Array],
    cache: Cache,
    kind: type[C],
    out: Mapping[str, Array] | None,
) -> tuple[C, dict[str, int], dict[str, Array]]:
    """What every `CachedSession.step` begins with: its arguments are checked; `step_spec` is `spec` without states.

    Returns the cache, which must be of a `kind`, the sizes of the call, and an array for each output: those of `out`, new ones
    for others. Raises UsageError.
    """  # fmt: skip
    if not isinstance(cache, kind):
        raise UsageError(f"graph {spec.name}: {type(cache).__name__} is not a cache of this session")
    sizes = check_feeds(step_spec, feeds)
    given = {} if out is None else out
    outputs = writeable(step_spec, check_out(step_spec, sizes, given), given)
    check_continues(spec, feeds["position_ids"], sizes["batch"], cache)
    return cache, sizes, outputs


class EngineCache:
    """See `Cache`. `arrays` are [batch, kv_heads, capacity, head_dim], in the order of the graph's states, and behind them,
    if they are `scaled`, float32[batch, kv_heads, capacity] for each. Capacity doubles when it is full, up to `limit`; rows
    cost memory once they are written.
    """

    def __init__(self, spec: GraphSpec, capacity: int, batch: int, dtype: npt.DTypeLike, scaled: bool = False) -> None:
        """Raises UsageError for a capacity or a batch that the graph does not take."""
        check_capacity(spec, capacity, batch)
        self.spec = spec
        self.batch = batch
        self.length = 0
        self.growths = 0
        """How often the arrays were made anew: what is bound to them holds as long as this stays the same."""
        self.limit = spec.dims["past"].max
        self.names = tuple(pair.input for pair in spec.states)
        self.dtype = np.dtype(dtype)
        self.scaled = scaled
        kv_heads, head_dim = (int(d) for d in spec.input(self.names[0]).shape[2:])
        self._heads = kv_heads
        rows: list[tuple[tuple[int, ...], npt.DTypeLike]] = [((head_dim,), dtype)] * len(self.names)
        self._rows = rows + [((), np.float32)] * (len(self.names) if scaled else 0)
        """Shape and type of what an array holds of a head and a token."""
        self.arrays: list[Array] = [self._empty(capacity, *row) for row in self._rows]

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return int(self.arrays[0].shape[2])

    @property
    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def used_bytes(self) -> int:
        """See `Cache.used_bytes`."""
        return self.nbytes // self.capacity * self.length

    def trim(self, length: int) -> None:
        """See `Cache.trim`."""
        check_trim(self, length)
        self.length = length

    def fork(self, batch: int) -> Self:
        """See `Cache.fork`."""
        check_fork(self)
        copy = self._like(batch)
        for mine, other in zip(self.arrays, copy.arrays, strict=True):
            other[:, :, : self.length] = mine[:, :, : self.length]
        copy.length = self.length
        return copy

    def reorder(self, beams: npt.NDArray[np.int64], start: int) -> None:
        """See `Cache.reorder`."""
        check_reorder(self, beams)
        moved = np.flatnonzero(beams != np.arange(self.batch))
        if start >= self.length or not len(moved):
            return
        for array in self.arrays:
            array[moved, :, start : self.length] = array[beams[moved], :, start : self.length]

    def save(self) -> dict[str, Array]:
        """See `Cache.save`."""
        return self._filled()

    def _filled(self) -> dict[str, Array]:
        labels = [*self.names, *(f"{name}.scale" for name in self.names if self.scaled)]
        return {label: array[:, :, : self.length] for label, array in zip(labels, self.arrays, strict=True)}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """See `Cache.restore`."""
        self.length = 0
        length = check_restored(self._filled(), arrays, 2, self.limit)
        self.reserve(length)
        self.length = length
        for name, array in self._filled().items():
            array[:] = arrays[name]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises PromptError if the model's context is full."""
        needed = self.length + tokens
        if needed <= self.capacity:
            return
        if needed > self.limit:
            raise PromptError(
                f"{needed} tokens do not fit: context_length is {self.limit}; shorten the prompt or use fewer pictures"
            )
        capacity = min(self.limit, max(needed, 2 * self.capacity))
        self.growths += 1
        for i, old in enumerate(self.arrays):
            # one layer at a time: the old array is freed before the next is made
            new = self._empty(capacity, *self._rows[i])
            new[:, :, : self.length] = old[:, :, : self.length]
            self.arrays[i] = new

    def _like(self, batch: int) -> Self:
        """An empty cache of the same kind and capacity."""
        return type(self)(self.spec, self.capacity, batch, self.dtype, self.scaled)

    def _empty(self, capacity: int, row: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        shape = (self.batch, self._heads, capacity, *row)
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < MAPPED_BYTES:
            return np.empty(shape, dtype)
        if sys.platform == "win32":
            pages = mmap.mmap(-1, nbytes)
        else:  # told nothing, a process would share them with those that it forks
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, dtype).reshape(shape)
