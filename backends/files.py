"""Files that are there whole or not at all: what is written takes a temporary name first, and its own when it is done.

Those that are read where they lie are mapped: all processes share the system's file cache.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import ExecutionError, StorageError

PARTIAL = ".partial"
"""Suffix of temporary names: what carries it was being written when the writer was killed."""


@contextlib.contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A new file, which takes the place of `path` if the block ends without an error, and else is gone.

    It has a name that no other writer has: several processes may write the same. A `private` one is its owner's alone.
    Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    mode = 0o600 if private else 0o666
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, if all went well
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that `path` holds either what it held or all of `text`. Raises StorageError."""
    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: not written: {reason(error)}") from error


def reason(error: OSError) -> str:
    """What an error of the system says, in words."""
    return error.strerror or str(error)


def give_back(mapped: mmap.mmap) -> None:
    """Let go of the pages of a mapped file that are in this process's memory; one that is read again comes from the
    system's file cache. Does nothing where the system cannot.
    """
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path) -> mmap.mmap:
    """A file of a bundle, mapped to be read, in huge pages where the system has them for files (Linux, by file system): the
    walks through its tables of small ones take 4 to 8 % of a decoder's step. Raises ExecutionError if it cannot be mapped.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        why = reason(error) if isinstance(error, OSError) else "it is empty"
        raise ExecutionError(f"{path}: cannot be read: {why}; build the bundle again") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
