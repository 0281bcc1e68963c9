"""A process that is measured beside others: asked one line at a time, and stopped while another one is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from lensc.backends import errors
from lensc.backends.errors import ExecutionError, LensError, UnavailableError
from lensc.export.memory import peak_bytes_of

LOG_BYTES = 4096
"""Of the end of what a process wrote to stderr: the line that says why it ended is in it."""

ENDING_S = 5
"""How long a process may take to end that has closed its output."""


def end_with_us() -> None:
    """Let SIGTERM unwind this process, so that contenders are closed: a stopped one would hold its memory for ever."""
    signal.signal(signal.SIGTERM, _unwind)


@contextmanager
def ending_with_us() -> Iterator[None]:
    """The same for as long as something is measured; what SIGTERM did before, it does afterwards."""
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unwind(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


class Contender:
    """A server: it writes a line of JSON with `load_seconds` when it is ready, and one for each line that it reads. Started
    stopped: only the one that is asked runs. A line `{"error": {"type": …, "message": …}}` is raised.

    Threads of an engine spin for a while after they had work; those of a stopped process do not.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path | None = None, environment: dict[str, str] | None = None
    ):
        """Start `command` and wait until it is ready. Its errors go to `<folder>/<name>.log`, or to a file that goes with it.
        Raises ExecutionError if it ends instead, and what it reports; UnavailableError where processes cannot be stopped.
        """
        if not hasattr(signal, "SIGSTOP"):
            raise UnavailableError(
                "measuring needs a system that can stop and continue processes, as Linux and macOS do"
            )
        self.name = name
        path = None if folder is None else folder / f"{name.replace(' ', '-')}.log"
        self._where = "" if path is None else f" (see {path})"
        self._log = tempfile.TemporaryFile("w+b") if path is None else open(path, "w+b")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.ready = self._first_answer()
        self.load_s = float(self.ready["load_seconds"])
        self._stop()

    def ask(self, line: str) -> dict[str, Any]:
        """What it answers to `line`. Raises ExecutionError if it ends instead, and what it reports."""
        os.kill(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        try:
            return self._answer()
        finally:
            if self._process.returncode is None:
                self._stop()

    def seconds(self, line: str) -> float:
        """How long it says that `line` took."""
        return float(self.ask(line)["seconds"])

    def peak_bytes(self) -> int:
        """The most memory it had resident, pages of mapped files included. Raises UnavailableError if nobody tells."""
        peak = peak_bytes_of(self._process.pid)
        if peak is None:
            raise UnavailableError(f"{self.name}: this system does not tell how much memory a process had; use Linux")
        return peak

    def close(self) -> None:
        """End the process; closing again does nothing."""
        if self._log.closed:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _first_answer(self) -> dict[str, Any]:
        try:
            return self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # an engine may print to stdout, too
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise _reported(answer["error"])
                return answer
        raise self._ended()

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def _ended(self) -> ExecutionError:
        try:
            self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:  # it talks to nobody anymore, and goes on
            self._process.kill()
        self._process.communicate()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "it wrote nothing"
        self.close()
        return ExecutionError(f"{self.name}: ended with {self._process.returncode}: {reason}{self._where}")


def _reported(error: dict[str, Any]) -> LensError:
    """The error that a process reports."""
    kind = getattr(errors, str(error["type"]), LensError)
    return kind(error["message"]) if isinstance(kind, type) and issubclass(kind, LensError) else LensError(str(error))
