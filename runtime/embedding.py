"""The embedding table: rows are gathered on the host, from a memory-mapped file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Array
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import GraphError, ManifestError, TokenizerError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

TABLE, SCALES = "embed_tokens", "embed_tokens.scale"
"""Names in the manifest's `tables`; the scales are there only if the table is int8."""


class EmbeddingTable:
    """Rows [vocab, D] in float16 or float32, or int8 with `scales: float32[vocab]`, one per row."""

    def __init__(self, values: Array, scales: F32 | None = None) -> None:
        self._values = values
        self._scales = scales

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
        rows: F32 = self._values[ids].astype(np.float32, copy=False)
        return rows if self._scales is None else rows * self._scales[ids, None]

    def check(self, decoder: DecoderSpec) -> None:
        """Raise GraphError if this is not the embedding table that `decoder` describes."""
        shape, dtype = (decoder.vocab_size, decoder.hidden_size), self._values.dtype
        if self._values.shape != shape or dtype not in (np.float16, np.float32, np.int8):
            raise GraphError(
                f"embed_tokens is {dtype}{list(self._values.shape)}, expected float16, float32 or int8{list(shape)}; "
                "build the bundle again"
            )
        found = None if self._scales is None else (self._scales.dtype, self._scales.shape)
        expected = (np.dtype(np.float32), shape[:1]) if dtype == np.int8 else None
        if found != expected:
            raise GraphError(
                f"embed_tokens is {dtype}, its scales are {found}, expected {expected}; build the bundle again"
            )


def open_table(folder: Path, tables: Mapping[str, str]) -> EmbeddingTable:
    """The embedding table in `folder`, memory-mapped; `tables` as in the manifest. Raises ManifestError."""
    if TABLE not in tables:
        raise ManifestError(f"{folder}: tables: no embed_tokens, expected the embedding table; build the bundle again")
    arrays = {name: _mapped(folder / tables[name]) for name in (TABLE, SCALES) if name in tables}
    return EmbeddingTable(arrays[TABLE], arrays.get(SCALES))


def _mapped(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path}: cannot be read as npy: {error}; build the bundle again") from error
    # As a plain array over the same mapping: indexing the memmap subclass costs microseconds more per token.
    return np.asarray(array)
