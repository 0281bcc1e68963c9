"""Image embeddings on disk: a picture that was seen before, by whatever process, is not encoded again.

    <cache>/pictures/<key>.slice      SHA-256 of what follows, then float32[Q, D] of one slice

The key is the slice's pixels, how far it is padded where features depend on that, and the recipe: vision graph with its
weights, preprocessing, padding. Not the engine: all whose artifact passed parity against that graph share it. It is off
unless a size is given: embeddings tell what is in a picture, and not everybody wants that kept. Files are readable by
their owner only, and may be deleted at any time; $XDG_CACHE_HOME moves the folder.

Processes may share it: a file appears whole, under its final name, and one that another process removed is encoded again.
The least recently used go first. A damaged file is removed, a disk that is full ends the writing, and a note says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lensc.backends.errors import UsageError
from lensc.backends.files import PARTIAL, reason, replacing
from lensc.profiles.folders import cache_folder

F32 = npt.NDArray[np.float32]

FOLDER = "pictures"
SUFFIX = ".slice"
FORMAT = 1
HASH_BYTES = 32
ABANDONED_S = 3600.0
"""A temporary file of this age belongs to a process that was killed."""


class PictureCache:
    """Embeddings of slices, each float32[Q, D], by their keys."""

    def __init__(self, recipe: Mapping[str, object], shape: tuple[int, int], limit_bytes: int) -> None:
        """`recipe`: all that features depend on besides the slice itself. Raises UsageError without a cache folder."""
        folder = cache_folder()
        if folder is None:
            raise UsageError("picture cache: there is no home folder to keep it in; set XDG_CACHE_HOME")
        self.folder = folder / FOLDER
        self._recipe = json.dumps({**recipe, "format": FORMAT}, sort_keys=True).encode()
        self._shape = shape
        self._limit_bytes = limit_bytes
        self._writes = True
        self._notes: list[str] = []

    def get(self, key: bytes) -> F32 | None:
        """The features of the slice `key`, if they are kept."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(f"picture cache {path.name} cannot be read: {error.strerror or error}")
            return None
        expected = HASH_BYTES + 4 * self._shape[0] * self._shape[1]
        if len(data) != expected or hashlib.sha256(data[HASH_BYTES:]).digest() != data[:HASH_BYTES]:
            self._note(f"picture cache: {path.name} was damaged and is removed; the slice is encoded again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # used just now
            os.utime(path)
        return np.frombuffer(data, np.float32, offset=HASH_BYTES).reshape(self._shape)

    def put(self, key: bytes, features: F32) -> None:
        """Keep the features of a slice, unless an earlier one could not be written."""
        data = np.ascontiguousarray(features, np.float32).tobytes()
        if not self._writes or HASH_BYTES + len(data) > self._limit_bytes:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self._path(key), private=True) as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            self._remove_oldest()
        except OSError as error:
            self._writes = False
            self._note(f"picture cache {self.folder}: not written: {reason(error)}; no more pictures are kept")

    def only_read(self, why: str) -> None:
        """Keep no more, and note why."""
        if self._writes:
            self._writes = False
            self._note(f"picture cache: {why}; no more pictures are kept")

    def notes(self) -> list[str]:
        """What went wrong since it was last asked."""
        notes, self._notes = self._notes, []
        return notes

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _path(self, key: bytes) -> Path:
        return self.folder / (hashlib.sha256(self._recipe + key).hexdigest() + SUFFIX)

    def _remove_oldest(self) -> None:
        """Until what is left has room; also what processes left that were killed. Raises OSError."""
        files: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed by another process
                    state = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(SUFFIX):
                        files.append((state.st_mtime_ns, state.st_size, entry.path))
                    elif entry.name.endswith(PARTIAL) and state.st_mtime < time.time() - ABANDONED_S:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
