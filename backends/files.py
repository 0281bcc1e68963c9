"""Files that are there whole or not at all: what is written takes a temporary name first, and its own when it is done."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import StorageError

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
