"""A process that is measured beside others: asked one line at a time, and stopped while another one is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lensc.backends.errors import ExecutionError, UnavailableError
from lensc.export.memory import peak_bytes_of


def end_with_us() -> None:
    """Let SIGTERM unwind this process, so that contenders are closed: a stopped one would hold its memory for ever."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class Contender:
    """A server of `lensc.bench.rivals`' protocol. Started stopped: only the one that is asked runs.

    Threads of an engine spin for a while after they had work; those of a stopped process do not.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None):
        """Start `command`, its errors going to `<folder>/<name>.log`, and wait until it is ready. Raises ExecutionError."""
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}.log"
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.load_s = float(self._answer()["load_seconds"])
        self._stop()

    def ask(self, line: str) -> dict[str, Any]:
        """What it answers to `line`. Raises ExecutionError if it ends instead."""
        os.kill(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        answer = self._answer()
        self._stop()
        return answer

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
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # an engine may print to stdout, too
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise self._ended()

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def _ended(self) -> ExecutionError:
        self.close()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "it wrote nothing"
        return ExecutionError(f"{self.name}: ended with {self._process.returncode}: {reason} (see {self._log})")
