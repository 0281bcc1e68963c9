"""A KV cache in a GPU's memory that an engine of TensorRT updates in place.

Per layer one array of keys and one of values, [batch, kv_heads, capacity, head_dim], all in one block. The capacity is the
model's context: TensorRT wants it fixed. What was never written is zero: behind a mask, anything but NaN would do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lensc.export.graph import GraphSpec

from ._tensorrt_device import Device
from ._tensorrt_target import ITEM_BYTES, Half, caches, capacity_of
from .base import Array, check_capacity, check_fork, check_reorder, check_restored, check_trim
from .errors import PromptError

STORED: dict[Half, npt.DTypeLike] = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
"""What numpy calls the type of a cache; it has no bfloat16, whose bits are those of uint16."""


class Blocks:
    """Memory for caches. The block that was given back last is kept, so that the next conversation's cache lies where the last
    one's did, and the CUDA graphs that point there serve again.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._kept: tuple[int, int] | None = None
        self._is_closed = False

    def take(self, nbytes: int) -> int:
        """The address of so many zeros. Raises ExecutionError."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[1] != nbytes:
            self.device.free(kept[0])
            kept = None
        address = self.device.allocate(nbytes) if kept is None else kept[0]
        self.device.clear(address, nbytes)
        return address

    def give(self, address: int, nbytes: int) -> None:
        """Take a block back."""
        if self._is_closed:
            self.device.free(address)
            return
        if self._kept is not None:
            self.device.free(self._kept[0])
        self._kept = (address, nbytes)

    def close(self) -> None:
        """Free what is kept; what is given back later is freed at once."""
        self._is_closed = True
        if self._kept is not None:
            self.device.free(self._kept[0])
            self._kept = None


class TensorRTCache:
    """See `Cache`."""

    def __init__(self, spec: GraphSpec, blocks: Blocks, half: Half, capacity: int, batch: int) -> None:
        """Raises UsageError for a capacity or a batch that the graph does not take, ExecutionError if it does not fit."""
        check_capacity(spec, capacity, batch)
        self.spec, self.half = spec, half
        self.batch = batch
        self.length = 0
        self._blocks, self._device = blocks, blocks.device
        self._aside: tuple[int, int] | None = None
        """Memory through which sequences change places."""
        self.names = tuple(pair.input for pair in spec.states)
        tensor = caches(spec, half)[0]
        self._kv_heads, self._capacity, self._head_dim = (int(d) for d in tensor.shape[1:])
        self.shape = (batch, self._kv_heads, self._capacity, self._head_dim)
        self._row_bytes = self._head_dim * ITEM_BYTES[half]
        self._pitch = self._capacity * self._row_bytes
        """Bytes of a head of a sequence."""
        self._array_bytes = batch * self._kv_heads * self._pitch
        self._block = blocks.take(self.nbytes)

    def __del__(self) -> None:
        block = self.__dict__.pop("_block", None)
        if block is not None:
            self._blocks.give(block, self.nbytes)
            if self._aside is not None:
                self._device.free(self._aside[0])

    @property
    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return len(self.names) * self._array_bytes

    @property
    def used_bytes(self) -> int:
        """See `Cache.used_bytes`."""
        return self.nbytes // self._capacity * self.length

    def address(self, i: int) -> int:
        """Where array i lies."""
        return int(self._block) + i * self._array_bytes

    def trim(self, length: int) -> None:
        """See `Cache.trim`."""
        check_trim(self, length)
        self.length = length

    def fork(self, batch: int) -> TensorRTCache:
        """See `Cache.fork`."""
        check_fork(self)
        copy = TensorRTCache(self.spec, self._blocks, self.half, self._capacity, batch)
        for i in range(len(self.names)):
            for sequence in range(batch):
                self._copy_rows(copy.address(i) + sequence * self._kv_heads * self._pitch, self.address(i), 1, 0)
        copy.length = self.length
        return copy

    def reorder(self, beams: npt.NDArray[np.int64], start: int) -> None:
        """See `Cache.reorder`."""
        check_reorder(self, beams)
        moved = [int(i) for i in np.flatnonzero(beams != np.arange(self.batch))]
        width = (self.length - start) * self._row_bytes
        if not moved or width <= 0:
            return
        one = self._kv_heads * width
        aside = self._room_aside(len(moved) * one)
        first = start * self._row_bytes
        for i in range(len(self.names)):
            for place, sequence in enumerate(moved):
                source = self.address(i) + int(beams[sequence]) * self._kv_heads * self._pitch + first
                self._device.copy(aside + place * one, width, source, self._pitch, width, self._kv_heads)
            for place, sequence in enumerate(moved):
                to = self.address(i) + sequence * self._kv_heads * self._pitch + first
                self._device.copy(to, self._pitch, aside + place * one, width, width, self._kv_heads)

    def save(self) -> dict[str, Array]:
        """See `Cache.save`: float16, float32, or the bits of bfloat16."""
        saved = {name: self._empty(self.length) for name in self.names}
        for i, array in enumerate(saved.values()):
            width = self.length * self._row_bytes
            self._device.copy(array.ctypes.data, width, self.address(i), self._pitch, width, self._rows)
        self._device.wait()
        return saved

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """See `Cache.restore`."""
        self.length = 0
        empty = {name: self._empty(0) for name in self.names}
        length = check_restored(empty, arrays, 2, self._capacity)
        self._hold([arrays[name] for name in self.names], length)

    def fill(self, rows: Mapping[str, Array]) -> None:
        """Hold the tokens of `rows`, float32[tokens, batch, kv_heads, head_dim] by name, and nothing else."""
        held = [stored(rows[name].transpose(1, 2, 0, 3), self.half) for name in self.names]
        self._hold(held, held[0].shape[2])

    def rows(self, i: int, start: int, end: int) -> npt.NDArray[np.float32]:
        """The tokens from `start` to `end` of array i: float32[tokens, batch, kv_heads, head_dim]."""
        array = self._empty(end - start)
        width = (end - start) * self._row_bytes
        source = self.address(i) + start * self._row_bytes
        self._device.copy(array.ctypes.data, width, source, self._pitch, width, self._rows)
        self._device.wait()
        return as_float32(array, self.half).transpose(2, 0, 1, 3)

    def reserve(self, tokens: int) -> None:
        """Check that there is room for `tokens` more. Raises PromptError if the model's context is full."""
        needed, limit = self.length + tokens, capacity_of(self.spec)
        if needed > limit:
            raise PromptError(
                f"{needed} tokens do not fit: context_length is {limit}; shorten the prompt or use fewer pictures"
            )

    @property
    def _rows(self) -> int:
        """Heads of all sequences, each a pitch from the next."""
        return self.batch * self._kv_heads

    def _room_aside(self, nbytes: int) -> int:
        """Memory of so many bytes, which is kept: beams change places in every step, with more tokens each time."""
        if self._aside is None or self._aside[1] < nbytes:
            if self._aside is not None:
                self._device.free(self._aside[0])
                self._aside = None
            size = 1 << (nbytes - 1).bit_length()
            self._aside = (self._device.allocate(size), size)
        return self._aside[0]

    def _empty(self, length: int) -> Array:
        return np.empty((self.batch, self._kv_heads, length, self._head_dim), STORED[self.half])

    def _hold(self, arrays: list[Array], length: int) -> None:
        kept: list[Any] = [np.ascontiguousarray(array) for array in arrays]
        width = length * self._row_bytes
        for i, array in enumerate(kept):
            self._device.copy(self.address(i), self._pitch, array.ctypes.data, width, width, self._rows)
        self._device.wait()
        self.length = length

    def _copy_rows(self, to: int, source: int, sequences: int, start: int) -> None:
        first, width = start * self._row_bytes, (self.length - start) * self._row_bytes
        rows = sequences * self._kv_heads
        self._device.copy(to + first, self._pitch, source + first, self._pitch, width, rows)


def stored(array: Array, half: Half) -> Array:
    """`array: float32` as a cache holds it; bfloat16 rounds to the nearest, ties to even."""
    if half != "bfloat16":
        return np.ascontiguousarray(array, STORED[half])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def as_float32(array: Array, half: Half) -> npt.NDArray[np.float32]:
    """The inverse of `stored`."""
    if half != "bfloat16":
        return array.astype(np.float32)
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bytes_of(spec: GraphSpec, half: Half) -> int:
    """Bytes of a cache of one sequence."""
    return sum(math.prod(int(d) for d in t.shape[1:]) * ITEM_BYTES[half] for t in caches(spec, half))
