"""Where what is compiled lies until it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .base import Target
from .errors import StorageError


@contextmanager
def partial_folder(out: Path, target: Target) -> Iterator[Path]:
    """A new empty folder in `out` for what is made for `target`, removed at the end with what was not moved out of it.

    What the disk refuses inside becomes StorageError.
    """
    partial = out / f"{target.slug}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
