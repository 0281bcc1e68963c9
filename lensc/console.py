"""What the command line shows: a progress line on a terminal, tables, sizes, JSON. Imports next to nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from lensc.backends.errors import UsageError

BAR = 20
TICK_S = 0.2


class Progress:
    """One line on stderr that says what is done and for how long; nothing unless stderr is a terminal.

    A context manager. Whatever else is printed meanwhile must go through `line`, or follow `clear`.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._on = self._stream.isatty()
        self._lock = threading.Lock()
        self._text = ""
        self._part: tuple[int, int] | None = None
        self._since = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._on:
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self.clear()

    def show(self, text: str, part: tuple[int, int] | None = None) -> None:
        """Show `text` from now on; `part` = (number, of how many) adds a bar."""
        with self._lock:
            self._text, self._part, self._since = text, part, time.monotonic()
        self._draw()

    def clear(self) -> None:
        """Take the line away until the next `show`."""
        with self._lock:
            if self._on and self._text:
                self._write("\r\x1b[K")
            self._text = ""

    def line(self, text: str) -> None:
        """Print a line that stays, above the progress line; on a terminal only."""
        with self._lock:
            if self._on:
                self._write(f"\r\x1b[K{text}\n")

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if not self._on or not self._text:
                return
            bar = ""
            if self._part is not None:
                number, total = self._part
                full = BAR * (number - 1) // max(total, 1)
                bar = f"[{'#' * full}{'-' * (BAR - full)}] {number}/{total} "
            seconds = time.monotonic() - self._since
            text = f"{bar}{self._text}" + (f" {seconds:.0f} s" if seconds >= 1 else "")
            self._write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def table(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """The rows in columns as wide as needed; the last column is not padded."""
    lines = [list(row) for row in rows]
    widths = [max((len(row[i]) for row in lines if i < len(row)), default=0) for i in range(max(map(len, lines)))]
    return "\n".join(
        indent + "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip()
        for row in lines
    )


def size(nbytes: int) -> str:
    """Bytes in decimal units: `5.35 MB`."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.3g} {unit}"


def printable(text: str) -> str:
    """`text` on one line, control characters escaped, so that a file's contents cannot move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def writable(text: str, flag: str, example: str) -> Path:
    """Where a result will go, looked at before there is one. Raises UsageError, which begins with `flag`."""
    path = Path(text)
    special = path.exists() and not path.is_file()
    if special or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        what = "is no plain file" if special else f"{path.parent} is no folder that can be written to"
        raise UsageError(f"{flag} {text}: {what}; expected a file, e.g. {example}")
    return path


def print_json(value: Any, stream: TextIO | None = None) -> None:
    """Print `value` as JSON on one line. An infinite number becomes the string "inf", NaN is an error."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=stream or sys.stdout, flush=True)
