"""A conversation in a file: what was said, its pictures, and the KV cache, so that going on feeds nothing again.

A zip archive, nothing in it compressed:

    conversation.json     format, model, messages, and what computed the cache
    pictures/0.png …      as they were opened: RGB in 8 bits
    cache/rows.npy        uint64[tokens, 4]: which rows the cache holds, see `prefix_cache`
    cache/<name>.npy      the arrays of `Cache.save`

The messages belong to a model. The cache is read only where the same graphs run on the same target; elsewhere the
conversation is fed again, and a note says so. A file is written under a temporary name, then renamed.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lensc.backends.base import Array
from lensc.backends.errors import InputError, LensError, StorageError
from lensc.backends.files import reason, replacing

from .picture_source import open_picture
from .prefix_cache import Held, Rows
from .prompt import ROLES, Message, Text, parse_messages

FORMAT = 1
SUMMARY = "conversation.json"
SUMMARY_BYTES = 64 << 20
"""More text than any context holds."""


@dataclass(frozen=True)
class Identity:
    """Whose conversations a model can go on with."""

    model: str = ""
    """SHA-256 of the checkpoint."""
    cache: str = ""
    """All that decides what a KV cache holds: graphs, target, the engine's options."""


NOBODY = Identity()


@dataclass(frozen=True, eq=False)
class Restored:
    """What a file held: `messages` as `VLM.chat` takes them, and how many tokens of them are in the KV cache again."""

    messages: list[dict[str, Any]]
    cached_tokens: int
    notes: tuple[str, ...]


def write(path: Path, messages: Sequence[Message], name: str, identity: Identity, held: Held | None) -> None:
    """Write a conversation with the model `name`. Raises StorageError, also if `path` is something else already."""
    if path.exists() and not _is_conversation(path):
        raise StorageError(f"{path} exists and is no conversation of lensc; choose another name")
    try:
        with replacing(path, private=True) as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _write_all(archive, messages, name, identity, held)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: not written: {reason(error)}") from error


def _write_all(
    archive: zipfile.ZipFile, messages: Sequence[Message], name: str, identity: Identity, held: Held | None
) -> None:
    pictures = 0
    said = []
    for message in messages:
        content = []
        for part in message.content:
            if isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
                continue
            png = io.BytesIO()
            open_picture(part.source).image.save(png, "PNG")
            archive.writestr(f"pictures/{pictures}.png", png.getvalue())
            content.append({"type": "image", "path": f"pictures/{pictures}.png"})
            pictures += 1
        said.append({"role": message.role, "content": content})
    arrays: dict[str, Array] = {} if held is None else {"rows": held.rows, **held.cache.save()}
    for label, array in arrays.items():
        with archive.open(_member(label), "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    summary = {
        "format": FORMAT,
        "model": {"name": name, "checkpoint_sha256": identity.model},
        "cache": None if held is None else {"made_by": identity.cache, "arrays": list(arrays)},
        "messages": said,
    }
    archive.writestr(SUMMARY, json.dumps(summary, ensure_ascii=False))


@dataclass(frozen=True, eq=False)
class Read:
    """A file's messages; its cache only if this model can use it, else `notes` say why not."""

    messages: list[dict[str, Any]]
    rows: Rows | None
    arrays: dict[str, Array]
    notes: tuple[str, ...]


def read(path: Path, name: str, identity: Identity) -> Read:
    """Read a conversation with the model `name`. Raises InputError if it is none, damaged, or one with another model."""
    try:
        with zipfile.ZipFile(path) as archive:
            summary = _summary(archive, path)
            _check_model(summary, path, name, identity)
            messages = [_message(archive, message) for message in summary["messages"]]
            parse_messages(messages)
            cache = summary["cache"]
            if cache is None:
                return Read(messages, None, {}, ())
            if cache["made_by"] != identity.cache:
                note = f"{path}: its KV cache was computed by {cache['made_by']}, here is {identity.cache}"
                return Read(messages, None, {}, (f"{note}: the conversation is fed again",))
            arrays = {label: _array(archive, _member(label)) for label in cache["arrays"]}
        rows = arrays.pop("rows")
        if rows.dtype != np.uint64 or rows.ndim != 2 or rows.shape[1] != 4:
            raise ValueError(f"rows are {rows.dtype}{list(rows.shape)}")
        return Read(messages, rows, arrays, ())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except LensError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    # whatever a damaged or made-up archive leads to, and only the archive is read here
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        NotImplementedError,
    ) as error:
        detail = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error)
        raise InputError(f"{path}: no conversation of lensc, or damaged: {detail}") from error


def _is_conversation(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return SUMMARY in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _summary(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    summary = json.loads(_bytes(archive, SUMMARY, SUMMARY_BYTES))
    if type(summary) is not dict or type(summary.get("format")) is not int:
        raise ValueError(f"{SUMMARY} names no format")
    if summary["format"] > FORMAT:
        raise InputError(
            f"{path}: format {summary['format']} is newer than this package reads ({FORMAT}); upgrade lensc"
        )
    return summary


def _check_model(summary: Mapping[str, Any], path: Path, name: str, identity: Identity) -> None:
    found = summary["model"]
    if found["checkpoint_sha256"] != identity.model:
        raise InputError(
            f"{path}: a conversation with {found['name']} (checkpoint {found['checkpoint_sha256'][:12]}), this model is "
            f"{name} (checkpoint {identity.model[:12]}); load the bundle that it was held with"
        )


def _message(archive: zipfile.ZipFile, found: Mapping[str, Any]) -> dict[str, Any]:
    """As `VLM.chat` takes it."""
    if found["role"] not in ROLES:
        raise ValueError(f"role {found['role']!r}")
    content = []
    for part in found["content"]:
        if part["type"] == "image":
            picture = open_picture(_bytes(archive, part["path"]))
            content.append({"type": "image", "image": picture.image})
        else:
            content.append({"type": "text", "text": part["text"]})
    return {"role": found["role"], "content": content}


def _member(label: str) -> str:
    return f"cache/{label}.npy"


def _stored(archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    """Where a member lies. Nothing is compressed, so none is larger than the file."""
    info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{member} is compressed")
    return info


def _bytes(archive: zipfile.ZipFile, member: str, most: int | None = None) -> bytes:
    info = _stored(archive, member)
    if most is not None and info.file_size > most:
        raise ValueError(f"{member} has {info.file_size} bytes, expected at most {most}")
    return archive.read(info)


def _array(archive: zipfile.ZipFile, member: str) -> Array:
    """An array of exactly the bytes that the member has."""
    data = _bytes(archive, member)
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{member} has another version of npy")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy parses it as Python, and lets through what that raises
        raise ValueError(f"{member} has no header of npy") from error
    if fortran or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{member}: {dtype}{list(shape)} in {len(data)} bytes")
    array: Array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    return array
