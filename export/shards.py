"""Safetensors: headers, checked before a single weight is read, and the weights, read from where the header says.

A file is an 8-byte little-endian length, a JSON header of that length, and the data. The rules below are those of the
format; a file that breaks one is refused with the name of the file and the rule:

1. the file holds the 8 bytes of the length, and the header fits the file and `HEADER_BYTES`;
2. the header is a JSON object in UTF-8 that begins with `{`, without duplicate keys;
3. `__metadata__`, where present, maps strings to strings;
4. a tensor has `dtype`, `shape` and `data_offsets` and nothing else, and a dtype of the format;
5. a tensor's offsets span exactly the bytes its shape needs;
6. the tensors fill the data without overlap, hole or rest.

Weights are read, not mapped: the pages of a mapping count as the process's memory for as long as it lives, and a file
that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensc.backends.errors import CheckpointError, listed

from .fingerprint import FileState

HEADER_BYTES = 100_000_000
"""The format's own limit. The real header of 741 tensors is about 90 KB."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype the format knows, with the bits of one element."""

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The dtypes a weight may have; others are the mark of a quantized or foreign checkpoint."""

READ_BYTES = 64 << 20
"""Bytes per system call: Linux gives at most 2 GiB at once, and an interruption should not wait long."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as its header describes it.

    `dtype` is the format's spelling, e.g. `F16`; `offset` the byte of `file` where the tensor's `nbytes` begin.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0


def read_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of a safetensors file by name. Raises CheckpointError that names the file and the broken rule."""
    try:
        if path.exists() and not path.is_file():
            raise _broken(path, "not a plain file")
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _broken(path, f"{size} bytes, too short for the 8-byte header length; {_AGAIN}")
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_BYTES:
                raise _broken(path, f"header length {length} is over the format's limit of {HEADER_BYTES}")
            if length > size - 8:
                raise _broken(path, f"header length {length} reaches beyond the file of {size} bytes; {_AGAIN}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = _parse(path, text)
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    records = {}
    for name, entry in entries.items():
        record = _record(path, name, entry, 8 + length, problems, spans)
        if record is not None:
            records[name] = record
    if not problems:
        _check_spans(spans, size - 8 - length, problems)
    if problems:
        raise _broken(path, listed(problems, "; "))
    return records


def read_tensor(record: TensorRecord, state: FileState) -> Tensor:
    """The tensor of `record` as stored, in memory of its own; its file must have been in `state` all the time.

    Raises CheckpointError if the file cannot be read, has changed, or the dtype is none of `DTYPES`.
    """
    return _read(record, state, record.offset, record.shape)


def read_rows(record: TensorRecord, state: FileState, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` (exclusive) of a tensor of one dimension or more; only their bytes are read.

    Raises IndexError if there are no such rows, and what `read_tensor` does.
    """
    if not record.shape or not 0 <= start <= stop <= record.shape[0]:
        raise IndexError(f"tensor {record.name} {list(record.shape)} has no rows {start} to {stop}")
    row_bytes = record.nbytes // max(record.shape[0], 1)
    return _read(record, state, record.offset + start * row_bytes, (stop - start, *record.shape[1:]))


def _read(record: TensorRecord, state: FileState, offset: int, shape: tuple[int, ...]) -> Tensor:
    if record.dtype not in DTYPES:
        raise CheckpointError(
            f"{record.file}: tensor {record.name} is {record.dtype}, expected one of {', '.join(DTYPES)}"
        )
    tensor = torch.empty(shape, dtype=DTYPES[record.dtype])
    target = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with open(record.file, "rb", buffering=0) as file:
            state.check(record.file, FileState.of(file.fileno()))
            file.seek(offset)
            while len(target):
                count = file.readinto(target[:READ_BYTES])
                if not count:
                    break
                target = target[count:]
            state.check(record.file, FileState.of(file.fileno()))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{record.file}: tensor {record.name} cannot be read: {reason}") from error
    if len(target):
        raise CheckpointError(f"{record.file}: ends within tensor {record.name}; {_AGAIN}")
    return tensor


_AGAIN = "the file is truncated or damaged, copy it again"


def _broken(path: Path, rule: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid safetensors file: {rule}")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _broken(path, f"the header must begin with '{{', found {text[:1]!r}")
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise _broken(path, "the header's JSON is nested too deeply") from None
    except ValueError as error:
        raise _broken(path, f"the header is not JSON: {str(error)[:120]}") from None
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ must map strings to strings")
    return dict(document)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return result


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _record(
    path: Path, name: str, entry: Any, data: int, problems: list[str], spans: list[tuple[int, int, str]]
) -> TensorRecord | None:
    """The checked record of one entry of the header; `data` is the byte of the file where the tensors begin."""
    shown = ascii(name) if len(name) <= 100 else ascii(name[:97] + "...")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problems.append(f"tensor {shown} must have exactly dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        problems.append(f"tensor {shown} has an unknown dtype {ascii(dtype)[:60]}")
        return None
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_count, shape)):
        problems.append(f"tensor {shown} has a shape that is not a list of sizes: {ascii(shape)[:60]}")
        return None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        problems.append(f"tensor {shown} needs two data_offsets of at least 0, found {ascii(offsets)[:60]}")
        return None
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if end < begin or bits != 8 * (end - begin):
        problems.append(f"tensor {shown} {dtype}{shape} needs {-(-bits // 8)} bytes, data_offsets give {end - begin}")
        return None
    spans.append((begin, end, shown))
    return TensorRecord(name, path, dtype, tuple(shape), end - begin, data + begin)


def _check_spans(spans: list[tuple[int, int, str]], size: int, problems: list[str]) -> None:
    beyond = [(end, name) for _, end, name in sorted(spans) if end > size]
    if beyond:  # one sentence: a truncated file has them by the hundred
        more = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        problems.append(f"tensor {beyond[0][1]} ends at byte {beyond[0][0]} of {size} bytes of data{more}; {_AGAIN}")
    position, before = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin < position:
            problems.append(f"tensor {name} overlaps {before}")
        elif begin > position:
            problems.append(f"{begin - position} unused bytes lie between {before} and tensor {name}")
        position, before = max(position, end), f"tensor {name}"
    if not problems and position < size:
        problems.append(f"{size - position} bytes follow the last tensor")
