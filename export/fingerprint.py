"""What a file of weights is known by: its state, which must not change under way, and the SHA-256 of its contents.

Reading 17 GB only to learn that nothing changed takes about 15 seconds at best, so the hash of a large file is kept
in `hashes.json` in the user's cache folder, under the file's path and state. The state holds what every way of
writing to a file changes: size, both times, inode and device. A file that was written to less than `SETTLED_S` before
is hashed but not kept: its times could be the same after another write.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lensc.backends.base import sha256_file
from lensc.backends.errors import CheckpointError
from lensc.backends.files import replacing
from lensc.profiles.folders import cache_folder

CACHE = "hashes.json"
CACHED_FROM_BYTES = 64 << 20
"""Smaller files are hashed each time: that takes well under a second."""
CACHE_ENTRIES = 512
SETTLED_S = 3.0
"""The times of FAT, the coarsest file system in use, count in steps of 2 seconds."""


@dataclass(frozen=True)
class FileState:
    """A file as it was at one moment. `changed_ns` is the time of the last change of contents, name or rights."""

    size: int
    mtime_ns: int
    changed_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """The state of a path or of an open file's descriptor. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    def check(self, file: Path, now: FileState) -> None:
        """Raise CheckpointError if `file`, of this state when it was opened, has other contents `now`.

        Size and time of writing decide; inode and device do not, as some network file systems make them up anew.
        """
        if now.size != self.size:
            found = f"{self.size} bytes became {now.size}"
        elif now.mtime_ns != self.mtime_ns:
            found = "it was written to"
        else:
            return
        raise CheckpointError(f"{file}: changed while it was being read: {found}; wait until it is complete, run again")


def file_state(file: Path) -> FileState:
    """The state of `file`. Raises CheckpointError if it cannot be had."""
    try:
        return FileState.of(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def sha256_of(file: Path, state: FileState) -> str:
    """SHA-256 of the contents of `file`, which must have been in `state` all the time; kept for the next run.

    Raises CheckpointError if the file cannot be read or is not in `state`.
    """
    state.check(file, file_state(file))
    cache = _cache_file() if state.size >= CACHED_FROM_BYTES else None
    known = _kept(cache, file, state) if cache is not None else None
    if known is not None:
        return known
    began = time.time()
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    state.check(file, file_state(file))
    if cache is not None and began - max(state.mtime_ns, state.changed_ns) / 1e9 > SETTLED_S:
        _keep(cache, file, state, digest)
    return digest


def _cache_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / CACHE


def _entries(cache: Path) -> dict[str, Any]:
    """What the cache holds; nothing if it is missing or damaged."""
    try:
        data = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = data.get("files") if isinstance(data, dict) and data.get("format") == 1 else None
    return entries if isinstance(entries, dict) else {}


def _kept(cache: Path, file: Path, state: FileState) -> str | None:
    entry = _entries(cache).get(str(file.resolve()))
    if not isinstance(entry, dict) or entry.get("state") != asdict(state):
        return None
    digest = entry.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEX else None


_HEX = frozenset("0123456789abcdef")


def _keep(cache: Path, file: Path, state: FileState, digest: str) -> None:
    """Add an entry. Of two processes that write at once one entry is lost, which costs hashing that file again."""
    entries = _entries(cache)
    entries.pop(str(file.resolve()), None)
    entries[str(file.resolve())] = {"state": asdict(state), "sha256": digest}
    text = json.dumps({"format": 1, "files": dict(list(entries.items())[-CACHE_ENTRIES:])}, indent=1)
    # a cache that cannot be written is a slower next run, no failure of this one
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as out:
            out.write(text.encode())
