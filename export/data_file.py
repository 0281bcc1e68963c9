"""The data file of an ONNX graph: tensors one after the other, written once, resumed where an interruption cut it.

Beside a file that is being written lies `<file>.journal`, a line for each tensor that is complete. Who opens the same
file with the same key goes on behind the last tensor whose bytes are still those of the journal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE = 4096
"""Tensors begin on a page, so that an engine can map them."""

JOURNAL = ".journal"
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies in the file."""

    name: str
    offset: int
    bytes: int
    sha256: str


class DataFile:
    """A context manager; `write` the tensors in the same order each time, then `finish`."""

    def __init__(self, path: Path, key: str) -> None:
        """`key` names all that the content follows from: another key starts over. Raises OSError, as all methods do."""
        self.path = path
        self._key = key
        self._journal_path = path.with_name(path.name + JOURNAL)

    def __enter__(self) -> Self:
        self._kept = self._recover()
        self._position = self._kept[-1].offset + self._kept[-1].bytes if self._kept else 0
        self._file = open(self.path, "r+b" if self._kept else "wb")
        self._file.truncate(self._position)
        self._file.seek(self._position)
        self._journal = open(self._journal_path, "w", encoding="utf-8")
        self._journal.write(json.dumps(self._key) + "\n")
        for extent in self._kept:
            self._note(extent)
        self._kept.reverse()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._journal.close()

    def write(self, name: str, pieces: Callable[[], Iterable[bytes | memoryview]]) -> Extent:
        """Append the tensor `name`, whose bytes are those of `pieces` joined, or find it written already."""
        if self._kept:
            kept = self._kept.pop()
            if kept.name == name:
                return kept
            # another order than before: what follows is of no use
            self._kept.clear()
            self._position = kept.offset
            self._file.truncate(self._position)
        start = -(-self._position // PAGE) * PAGE
        self._file.seek(start)
        digest, count = hashlib.sha256(), 0
        for piece in pieces():
            self._file.write(piece)
            digest.update(piece)
            count += len(piece)
        self._file.flush()
        self._position = start + count
        extent = Extent(name, start, count, digest.hexdigest())
        self._note(extent)
        return extent

    def finish(self) -> None:
        """The file is complete: the journal goes."""
        self._file.truncate(self._position)
        self._file.close()
        self._journal.close()
        self._journal_path.unlink()

    def _note(self, extent: Extent) -> None:
        self._journal.write(json.dumps(asdict(extent)) + "\n")
        self._journal.flush()

    def _recover(self) -> list[Extent]:
        """The tensors of an earlier run, up to the first that is not as the journal says."""
        kept: list[Extent] = []
        try:
            lines = self._journal_path.read_text(encoding="utf-8").splitlines(keepends=True)
            if not lines or json.loads(lines[0]) != self._key:
                return []
            with open(self.path, "rb") as file:
                for line in lines[1:]:
                    extent = Extent(**json.loads(line))
                    if not line.endswith("\n") or not _intact(file.fileno(), extent):
                        break
                    kept.append(extent)
        except (OSError, ValueError, TypeError):
            pass
        return kept


def _intact(file: int, extent: Extent) -> bool:
    digest, position, end = hashlib.sha256(), extent.offset, extent.offset + extent.bytes
    while position < end:
        piece = os.pread(file, min(COPY_BYTES, end - position), position)
        if not piece:
            return False
        digest.update(piece)
        position += len(piece)
    return digest.hexdigest() == extent.sha256
