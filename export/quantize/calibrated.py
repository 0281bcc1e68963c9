"""Quantized weights on disk, chosen before the graphs are written: a file for each block of the model.

A file is safetensors: for a weight `W` the packed values `W` uint8[out, bytes] (see `weights.pack`), `W.scale`
float32[out, groups] and, for asymmetric formats, `W.zero_point` uint8[out, groups]. Its metadata hold, as JSON,
the key of all that the values follow from, and for each weight its format, its inputs, and the row that it begins with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lensc.backends.errors import GraphError
from lensc.backends.files import PARTIAL

from .linears import SCALE, ZERO_POINT
from .weights import QuantizedWeight, WeightFormat, pack, quantize_rtn, unpack

SUFFIX = ".calibrated.safetensors"
METADATA = "calibrated"


@dataclass(frozen=True)
class _Piece:
    """Rows `first` to `last` (exclusive) of a weight, in `file`."""

    file: Path
    format: WeightFormat
    inputs: int
    first: int
    last: int


def is_calibrated(format: WeightFormat) -> bool:
    """Whether weights of `format` are calibrated; those of eight bits are rounded to nearest and not stored."""
    return format.bits < 8


class Calibrated:
    """A `writer.Quantize` that gives the stored values of a weight, whatever the rows given are."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files of `folder`. Raises GraphError for one that is damaged."""
        self._folder = folder
        self._pieces: dict[str, list[_Piece]] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            for name, piece in _header(path)[1].items():
                self._pieces.setdefault(name, []).append(piece)

    def __call__(self, name: str, rows: Tensor, format: WeightFormat, start: int) -> QuantizedWeight:
        """The values of rows `start` on, as many as `rows: float[count, inputs]` has.

        Formats of eight bits round the rows. Raises GraphError for a weight, rows or a format that are not there.
        """
        if not is_calibrated(format):
            return quantize_rtn(rows, format)
        stop = start + rows.shape[0]
        pieces = [p for p in self._pieces.get(name, []) if p.first < stop and p.last > start]
        found = [_read(p, name, max(start, p.first), min(stop, p.last)) for p in sorted(pieces, key=lambda p: p.first)]
        count = sum(part.shape[0] for part in found)
        if count != stop - start or any(p.format != format or p.inputs != rows.shape[1] for p in pieces):
            held = ", ".join(f"rows {p.first} to {p.last} in {p.format}, {p.inputs} inputs" for p in pieces)
            raise GraphError(
                f"weight {name}: rows {start} to {stop} in {format}, {rows.shape[1]} inputs, are not in {self._folder}, "
                f"which has {held or 'none of them'}; calibrate again"
            )
        if len(found) == 1:
            return found[0]
        zeros = [part.zero_points for part in found if part.zero_points is not None]
        return QuantizedWeight(
            torch.cat([part.values for part in found]),
            torch.cat([part.scales for part in found]),
            torch.cat(zeros) if zeros else None,
            format,
        )


def block_path(folder: Path, block: str) -> Path:
    """The file of the block `block` of a `StreamedModel`."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', block).rstrip('-')}{SUFFIX}"


def write_block(path: Path, weights: Mapping[str, QuantizedWeight], key: str, first: int = 0) -> None:
    """Write a block's weights, which begin with row `first` each; `path` is replaced by a complete file. Raises OSError."""
    tensors: dict[str, Any] = {}
    described = {}
    for name, weight in weights.items():
        tensors[name] = pack(weight)
        tensors[name + SCALE] = weight.scales.contiguous().numpy()
        if weight.zero_points is not None:
            tensors[name + ZERO_POINT] = weight.zero_points.contiguous().numpy()
        described[name] = {"format": str(weight.format), "inputs": weight.shape[1], "first": first}
    partial = path.with_name(path.name + PARTIAL)
    # one entry, as several come in an order of their own each time
    save_file(tensors, partial, {METADATA: json.dumps({"key": key, "weights": described})})
    os.replace(partial, path)


def is_complete(path: Path, key: str) -> bool:
    """Whether `write_block` wrote `path` with the same `key`."""
    try:
        return path.is_file() and _header(path)[0] == key
    except GraphError:
        return False


def read_block(path: Path) -> dict[str, QuantizedWeight]:
    """The weights that `write_block` wrote to `path`. Raises GraphError."""
    return {name: _read(piece, name, piece.first, piece.last) for name, piece in _header(path)[1].items()}


def _header(path: Path) -> tuple[str, dict[str, _Piece]]:
    """The key, and what is in the file. Raises GraphError."""
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            pieces = {}
            for name, entry in about["weights"].items():
                count = file.get_slice(name).get_shape()[0]
                format = WeightFormat.parse(entry["format"])
                pieces[name] = _Piece(path, format, entry["inputs"], entry["first"], entry["first"] + count)
            return about["key"], pieces
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise GraphError(f"{path}: not a file of calibrated weights ({error}); calibrate again") from error


def _read(piece: _Piece, name: str, start: int, stop: int) -> QuantizedWeight:
    """Rows `start` to `stop` of the weight; no others are read. Raises GraphError."""
    rows = slice(start - piece.first, stop - piece.first)
    try:
        # The file is mapped only while it is open: its pages count as memory of the process.
        with safe_open(piece.file, "numpy") as file:
            packed = np.array(file.get_slice(name)[rows])
            scales = torch.from_numpy(np.array(file.get_slice(name + SCALE)[rows]))
            zeros = None
            if not piece.format.symmetric:
                zeros = torch.from_numpy(np.array(file.get_slice(name + ZERO_POINT)[rows]))
    except (OSError, SafetensorError) as error:
        raise GraphError(f"{piece.file}: weight {name} cannot be read ({error}); calibrate again") from error
    return unpack(packed, scales, zeros, piece.inputs, piece.format)
