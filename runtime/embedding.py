"""The embedding table: rows are gathered on the host, from a memory-mapped file."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Array
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import GraphError, ManifestError, TokenizerError
from lensc.backends.files import give_back

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

TABLE, SCALES = "embed_tokens", "embed_tokens.scale"
"""Names in the manifest's `tables`; the scales are there only if the table is quantized."""

MANY = 32
"""Rows of a prompt rather than of a step. Each row read brings in 64 KB around it, which is 70 MB for 1024 tokens."""

HALVES = np.stack([np.arange(256) % 16 - 8, np.arange(256) // 16 - 8], axis=1).astype(np.float32).view(np.uint64)[:, 0]
"""uint64[256]: the two numbers, -8 to 7, that a byte of a 4-bit table stands for, each as float32. Looking up both at
once is faster than shifting, masking and converting."""


class EmbeddingTable:
    """Rows [vocab, D] in one of three forms:

    float16 or float32 [vocab, D]
    int8[vocab, D] with `scales: float32[vocab]`, one per row
    uint8[vocab, D / 2], two numbers to a byte, the first in the low half and 8 above its value, with
        `scales: float32[vocab, groups]`, one for D / groups neighbouring numbers
    """

    def __init__(self, values: Array, scales: F32 | None = None, mapped: mmap.mmap | None = None) -> None:
        """`mapped`: where `values` lie, if it is a file."""
        self._values = values
        self._scales = scales
        self._mapped = mapped

    @classmethod
    def of(cls, table: Array | EmbeddingTable) -> EmbeddingTable:
        """`table`, or the table that an array of floats is."""
        return table if isinstance(table, EmbeddingTable) else cls(table)

    def gather(self, ids: I64) -> F32:
        """float32[n, D] for `ids: int64[n]`. Raises TokenizerError for an id outside of the table."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._values):
            raise TokenizerError(
                f"token id {int(ids.max())} is outside the embedding table of {len(self._values)} rows: "
                "the tokenizer belongs to another model; build the bundle again"
            )
        rows = self._values[ids]
        if len(ids) >= MANY and self._mapped is not None:
            give_back(self._mapped)
        if self._scales is None:
            return rows.astype(np.float32, copy=False)
        scales = self._scales[ids]
        if rows.dtype == np.int8:
            return rows.astype(np.float32) * scales[:, None]
        floats: F32 = HALVES.take(rows).view(np.float32)
        grouped = floats.reshape(*scales.shape, floats.shape[1] // scales.shape[1])
        grouped *= scales[:, :, None]
        return floats

    def check(self, decoder: DecoderSpec) -> None:
        """Raise GraphError if this is not the embedding table that `decoder` describes."""
        rows, width = decoder.vocab_size, decoder.hidden_size
        shape, dtype = self._values.shape, self._values.dtype
        packed = dtype == np.uint8
        if shape != (rows, width // 2 if packed else width) or dtype not in (np.float16, np.float32, np.int8, np.uint8):
            raise GraphError(
                f"embed_tokens is {dtype}{list(shape)}, expected float16, float32 or int8{[rows, width]}, or "
                f"uint8{[rows, width // 2]}; build the bundle again"
            )
        scales = self._scales
        found = None if scales is None else (scales.dtype, scales.shape)
        expected: tuple[np.dtype[np.float32], tuple[int, ...]] | None = None
        if dtype == np.int8:
            expected = (np.dtype(np.float32), (rows,))
        if packed:
            groups = scales.shape[1] if scales is not None and scales.ndim == 2 else 1
            expected = (np.dtype(np.float32), (rows, groups if groups and width % groups == 0 else 1))
        if found != expected:
            raise GraphError(
                f"embed_tokens is {dtype}, its scales are {found}, expected {expected}; build the bundle again"
            )


def open_table(folder: Path, tables: Mapping[str, str]) -> EmbeddingTable:
    """The embedding table in `folder`, memory-mapped; `tables` as in the manifest. Raises ManifestError."""
    if TABLE not in tables:
        raise ManifestError(f"{folder}: tables: no embed_tokens, expected the embedding table; build the bundle again")
    values, mapped = _mapped(folder / tables[TABLE])
    scales = _mapped(folder / tables[SCALES])[0] if SCALES in tables else None
    return EmbeddingTable(values, scales, mapped)


def _mapped(path: Path) -> tuple[Array, mmap.mmap]:
    """The array in a .npy file, and the map that it lies in."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path}: cannot be read as npy: {error}; build the bundle again") from error
    # As a plain array over the same mapping: indexing the memmap subclass costs microseconds more per token.
    return np.asarray(array), array.base
