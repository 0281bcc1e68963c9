"""Files that are read where they lie in the system's file cache, which all processes share."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

from .errors import ExecutionError


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
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise ExecutionError(f"{path}: cannot be read: {reason}; build the bundle again") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
