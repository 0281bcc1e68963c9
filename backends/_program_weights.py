"""The constants of a portable graph: where their bytes lie, and the data file for those that the kernels want otherwise.

Bytes are read and written in pieces of `PIECE_BYTES`, whatever the size of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lensc.kernels.linear.reference import unpack

from ._multiples import multiples
from ._program import TILE, TILED_INPUTS, TILED_OUTPUTS, Kind, Place
from .base import Array
from .errors import GraphError, StorageError

PIECE_BYTES = 16 << 20
ALIGNMENT = 64
"""Of tensors in a data file of our own: a cache line."""

BITS = {"FLOAT": 32, "INT8": 8, "UINT8": 8, "UINT4": 4, "UINT2": 2, "INT64": 64}
"""The types of tensors that can be constants, by ONNX's names."""

DTYPES: dict[str, np.dtype[Any]] = {"FLOAT": np.dtype("<f4"), "INT8": np.dtype(np.int8), "INT64": np.dtype("<i8")}
"""How their values are read; those of few bits as bytes."""

BYTES: np.dtype[Any] = np.dtype(np.uint8)


@dataclass(frozen=True, eq=False)
class Tensor:
    """The bytes of an initializer, in a file or held in memory, as ONNX packs them; `type` is one of `BITS`."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0
    held: bytes = b""

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * BITS[self.type] // 8)

    def array(self) -> Array:
        """The values, all at once; those of few bits are not unpacked. Raises GraphError."""
        data = b"".join(self.pieces())
        return np.frombuffer(data, DTYPES.get(self.type, BYTES))

    def reshaped(self, shape: tuple[int, ...]) -> Tensor:
        """The same bytes in another shape."""
        return Tensor(self.name, self.type, shape, self.file, self.offset, self.held)

    def pieces(self) -> Iterator[bytes]:
        """The bytes, from the first to the last. Raises GraphError."""
        for start in range(0, self.nbytes, PIECE_BYTES):
            yield self.read(start, min(PIECE_BYTES, self.nbytes - start))

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on. Raises GraphError if they cannot be read."""
        if self.file is None:
            return self.held[start : start + size]
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset + start)
                data = file.read(size)
        except OSError as error:
            raise GraphError(f"{self.file}: cannot be read: {error.strerror or error}; export it again") from error
        if len(data) != size:
            raise GraphError(f"{self.file}: {self.name} does not lie in it as the graph says; export it again")
        return data


def tensor_of(name: str, found: Any) -> Tensor:
    """An initializer's `onnx_ir` tensor. Raises GraphError for a type that no kernel takes, or bytes that are not there."""
    import onnx_ir as ir

    kind = found.dtype.name
    shape = tuple(int(d) for d in found.shape.numpy())
    if kind not in BITS:
        raise GraphError(f"constant {name}: {kind} is not one of {', '.join(BITS)}")
    if not isinstance(found, ir.ExternalTensor):
        tensor = Tensor(name, kind, shape, held=found.tobytes())
        if len(tensor.held) != tensor.nbytes:
            raise GraphError(f"constant {name}: {len(tensor.held)} bytes, expected {tensor.nbytes}; export it again")
        return tensor
    if Path(found.location).name != str(found.location):
        raise GraphError(f"constant {name}: its file {found.location!r} does not lie beside the graph")
    tensor = Tensor(name, kind, shape, Path(found.path), found.offset or 0)
    size = Path(found.path).stat().st_size if Path(found.path).is_file() else 0
    if found.length not in (None, tensor.nbytes) or tensor.offset + tensor.nbytes > size:
        raise GraphError(
            f"constant {name}: expected {tensor.nbytes} bytes at {tensor.offset} of {found.path}, which has {size}; "
            "export it again"
        )
    return tensor


@dataclass(frozen=True, eq=False)
class Blob:
    """A matrix as a kernel takes it: the tensor's rows, or with `turned` its columns; `tiled` is the order of `int8_tiles`."""

    tensor: Tensor
    turned: bool = False
    tiled: bool = False

    @property
    def rows(self) -> int:
        return self.tensor.shape[1] if self.turned else prod(self.tensor.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Rows end with whole bytes."""
        width = self.tensor.shape[0 if self.turned else -1]
        return width * BITS[self.tensor.type] // 8

    def pieces(self) -> Iterator[Array]:
        """The bytes from the first to the last, some rows at a time: uint8[n, row_bytes]. Raises GraphError."""
        if not self.tiled:
            yield from self._rows(1)
            return
        sums: list[Array] = []
        for rows in self._rows(TILED_OUTPUTS):
            values = rows.view(np.int8)
            sums.append(values.sum(1, dtype=np.int32))
            outputs, inputs = (-n % step for n, step in zip(values.shape, (TILED_OUTPUTS, TILED_INPUTS), strict=True))
            filled = np.pad(values, ((0, outputs), (0, inputs)))
            tiles = filled.reshape(len(filled) // TILE[0], TILE[0], -1, TILE[1]).transpose(0, 2, 1, 3)
            yield np.ascontiguousarray(tiles).view(np.uint8)
        yield np.concatenate(sums).astype("<i4").view(np.uint8)

    def _rows(self, multiple: int) -> Iterator[Array]:
        """Some rows at a time, a multiple of `multiple` but for the last: uint8[n, row_bytes]."""
        step = max(1, PIECE_BYTES // max(self.row_bytes, 1) // multiple) * multiple
        for start in range(0, self.rows, step):
            count = min(step, self.rows - start)
            if self.turned:
                yield self._columns(start, count)
            else:
                data = self.tensor.read(start * self.row_bytes, count * self.row_bytes)
                yield np.frombuffer(data, np.uint8).reshape(count, self.row_bytes)

    def _columns(self, start: int, count: int) -> Array:
        """Columns of a tensor whose values take whole bytes."""
        inputs, outputs = self.tensor.shape
        dtype = DTYPES.get(self.tensor.type, BYTES)
        made: Array = np.empty((count, inputs), dtype)
        step = max(1, PIECE_BYTES // (outputs * dtype.itemsize))
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            data = self.tensor.read(first * outputs * dtype.itemsize, (last - first) * outputs * dtype.itemsize)
            made[:, first:last] = np.frombuffer(data, dtype).reshape(last - first, outputs)[:, start : start + count].T
        rows: Array = made.view(np.uint8)
        return rows


@dataclass
class Blobs:
    """The constants of a program while it is made. A `Place` without a file is the number of one of them."""

    items: list[Blob] = field(default_factory=list)
    _known: dict[tuple[int, bool, bool], int] = field(default_factory=dict)
    _multiples: dict[int, tuple[Place, Place] | None] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, tensor: Tensor, turned: bool = False, tiled: bool = False) -> Place:
        """The place of a tensor, or of its columns; the same for the same tensor."""
        key = (id(tensor), turned, tiled)
        if key not in self._known:
            self._known[key] = len(self.items)
            self.items.append(Blob(tensor, turned, tiled))
        return Place("", self._known[key])

    def add_multiples(self, scale: Tensor) -> tuple[Place, Place] | None:
        """The places of steps, float32[outputs], and of their multiples, int8[outputs, groups], that make `scale:
        float32[outputs, groups]`; None if none do.
        """
        key = id(scale)
        if key not in self._multiples:
            found = multiples(scale.array().reshape(scale.shape[0], -1))
            self._multiples[key] = None if found is None else self._held(scale, *found)
        return self._multiples[key]

    def _held(self, scale: Tensor, of_groups: Array, steps: Array) -> tuple[Place, Place]:
        parts = (
            Tensor(f"{scale.name}.steps", "FLOAT", steps.shape, held=steps.astype("<f4").tobytes()),
            Tensor(f"{scale.name}.multiples", "INT8", of_groups.shape, held=of_groups.tobytes()),
        )
        self._kept.append(scale)  # its identity is a key
        steps_place, multiples_place = (self.add(part) for part in parts)
        return steps_place, multiples_place

    def settle(self, used: list[int], own: Path) -> Mapping[int, Place]:
        """Where each of the `used` constants lies: in the graph's data file if at least half of their bytes can be read
        there, the rest in the file `own`, which is written if it is needed.

        Raises GraphError, StorageError.
        """
        files = [blob.tensor.file for i in used if (blob := self.items[i]).tensor.file is not None]
        shared = files[0] if files else None
        there = {i for i in used if shared is not None and _lies_well(self.items[i], shared)}
        weight = {i: self.items[i].tensor.nbytes for i in used}
        if 2 * sum(weight[i] for i in there) < sum(weight.values()):
            there = set()
        places = {i: Place(str(shared and shared.name), self.items[i].tensor.offset) for i in there}
        rest = [i for i in used if i not in there]
        return {**places, **(self._write(rest, own) if rest else {})}

    def _write(self, wanted: list[int], own: Path) -> dict[int, Place]:
        partial, places = own.with_name(f"{own.name}.partial"), {}
        try:
            with open(partial, "wb") as file:
                for i in wanted:
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    places[i] = Place(own.name, file.tell())
                    blob = self.items[i]
                    as_it_is = not (blob.turned or blob.tiled)
                    file.writelines(blob.tensor.pieces() if as_it_is else (piece.data for piece in blob.pieces()))
            os.replace(partial, own)
        except OSError as error:
            raise StorageError(f"{own}: cannot be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return places


def _lies_well(blob: Blob, shared: Path) -> bool:
    """Whether a kernel can read the bytes where they lie."""
    alignment = 4 if blob.tensor.type == "FLOAT" else 1
    return not (blob.turned or blob.tiled) and blob.tensor.file == shared and blob.tensor.offset % alignment == 0


def is_default(zero_point: Tensor, kind: Kind) -> bool:
    """Whether all zero points are those that a weight without any has."""
    count = prod(zero_point.shape)
    bits = BITS[kind.upper()]
    values = zero_point.array() if kind == "int8" else unpack(zero_point.array(), bits, count)
    return bool((values == (0 if kind == "int8" else 2 ** (bits - 1))).all())
