"""The KV cache: preallocated rows that the engine fills in place.

Layout: for each layer one key and one value array float32[capacity, batch, kv_heads, head_dim], time first. The filled
part `[:length]` is then contiguous for any batch, so it is fed as a view, and the engine writes new rows straight into
`[length:length + tokens]`: nothing is copied per step. Rows are never touched before they are written, so a large
capacity costs address space, not memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Array, check_fork, check_reorder, check_restored, check_trim
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import PromptError, UsageError

F32 = npt.NDArray[np.float32]


class KVCache:
    """Keys and values of the tokens a decoder has seen.

    `capacity` rows are reserved; when they are full, capacity doubles (one copy, counted in `growths`) up to `limit`,
    which defaults to the model's context length.
    """

    def __init__(self, decoder: DecoderSpec, capacity: int, batch: int = 1, limit: int | None = None) -> None:
        limit = decoder.context_length if limit is None else limit
        if not 1 <= capacity <= limit <= decoder.context_length:
            raise UsageError(
                f"KV cache: capacity {capacity} and limit {limit} do not fit: expected "
                f"1 <= capacity <= limit <= context_length {decoder.context_length}"
            )
        if batch < 1:
            raise UsageError(f"KV cache: batch {batch}, expected at least 1")
        self.batch = batch
        self.length = 0
        self.growths = 0
        self.limit = limit
        self._decoder = decoder
        names = [f"{kind}.{i}" for i in range(decoder.num_layers) for kind in ("key", "value")]
        self._inputs = [f"past_{name}" for name in names]
        self._outputs = names
        self._arrays: list[F32] = [self._empty(capacity) for _ in names]

    @property
    def capacity(self) -> int:
        """How many rows are reserved."""
        return len(self._arrays[0])

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values of all layers."""
        return sum(a.nbytes for a in self._arrays)

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows that are filled."""
        return self.nbytes // self.capacity * self.length

    def past(self) -> dict[str, F32]:
        """Feeds `past_key.i` and `past_value.i`: views of the filled rows."""
        length = self.length
        return dict(zip(self._inputs, [a[:length] for a in self._arrays], strict=True))

    def slots(self, tokens: int) -> dict[str, F32]:
        """Outputs `key.i` and `value.i` for the next `tokens` rows: views the engine writes into.

        The rows count only after `advance(tokens)`. Raises PromptError if the limit would be passed.
        """
        start, end = self.length, self.length + tokens
        if end > self.capacity:
            self._grow(end)
        return dict(zip(self._outputs, [a[start:end] for a in self._arrays], strict=True))

    def advance(self, tokens: int) -> None:
        """Count the next `tokens` rows as filled."""
        if not 0 <= tokens <= self.capacity - self.length:
            raise UsageError(
                f"KV cache: cannot advance by {tokens}, {self.capacity - self.length} of {self.capacity} rows are free"
            )
        self.length += tokens

    def trim(self, length: int) -> None:
        """Forget all rows from `length` on."""
        check_trim(self, length)
        self.length = length

    def fork(self, batch: int) -> KVCache:
        """Make a cache of `batch` sequences that all begin with the rows of this one, which must have batch 1."""
        check_fork(self)
        copy = KVCache(self._decoder, self.capacity, batch, self.limit)
        for mine, other in zip(self._arrays, copy._arrays, strict=True):
            other[: self.length] = mine[: self.length]
        copy.length = self.length
        return copy

    def reorder(self, beams: npt.NDArray[np.int64], start: int) -> None:
        """Let sequence i continue sequence `beams[i]`: its rows from `start` on are copied, those before are shared.

        `start` is the length of the common prompt, which is the same in all sequences of a fork.
        """
        check_reorder(self, beams)
        moved = np.flatnonzero(beams != np.arange(self.batch))
        if start >= self.length or not len(moved):
            return
        sources = beams[moved]
        for array in self._arrays:
            array[start : self.length, moved] = array[start : self.length, sources]

    def save(self) -> dict[str, Array]:
        """See `Cache.save`."""
        return dict(self.past())

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """See `Cache.restore`."""
        self.length = 0
        length = check_restored(self.past(), arrays, 0, self.limit)
        self.slots(length)
        self.length = length
        for name, rows in self.past().items():
            rows[:] = arrays[name]

    def _empty(self, capacity: int) -> F32:
        d = self._decoder
        return np.empty((capacity, self.batch, d.num_kv_heads, d.head_dim), np.float32)

    def _grow(self, needed: int) -> None:
        if needed > self.limit:
            of = "context_length" if self.limit == self._decoder.context_length else "limit"
            raise PromptError(
                f"{needed} tokens do not fit: {of} is {self.limit}; shorten the prompt or use fewer pictures"
            )
        capacity = min(self.limit, max(needed, 2 * self.capacity))
        for i, old in enumerate(self._arrays):
            # One layer at a time: the old array is freed before the next is made.
            new = self._empty(capacity)
            new[: self.length] = old[: self.length]
            self._arrays[i] = new
        self.growths += 1
