"""A process of our own that a vendor's driver may hang, crash or print in: it answers in lines of JSON.

The parent calls `ask`. The child calls `answering` first, which says that it has begun: what is measured against the limit is
what the driver takes, not how long a busy machine needs to start Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from lensc.backends.errors import ExecutionError

BEGIN_S, ENDING_S, POLL_S = 60.0, 5.0, 0.01
"""How long a process may take to begin, and one that was killed to be gone; how often it is looked after."""
LAST_WORDS = 300


@dataclass(frozen=True)
class Answers:
    """What a process said, and what ended it before its time: `problem` is empty if nothing did."""

    said: tuple[dict[str, Any], ...]
    problem: str
    kind: Literal["", "crash", "timeout"]


def python(module: str) -> tuple[str, ...]:
    """The command that runs `module` in another Python."""
    return sys.executable, "-P", "-m", module


def ask(command: Sequence[str], limit_s: float) -> Answers:
    """Run `command` for at most `limit_s` from when it has begun. Raises ExecutionError if it cannot, or does not begin."""
    if getattr(sys, "frozen", False) or not sys.executable:
        raise ExecutionError("this program is no Python that could start another")
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=answers, stderr=log)
        except OSError as error:
            raise ExecutionError(f"no process can be started: {error.strerror or error}") from error
        try:
            late = _wait(process, answers, limit_s)
        finally:
            code = _ended(process)
        said = [json.loads(line) for line in _read(answers).splitlines() if line[:1] + line[-1:] == "{}"]
        log_lines = [line.strip() for line in _read(log).splitlines() if line.strip()]
    last = log_lines[-1][-LAST_WORDS:] if log_lines else "it said nothing"
    if not said:
        ended = "did not begin in time" if late else f"ended ({_ending(code)}) before it began: {last}"
        raise ExecutionError(f"a process that was started {ended}")
    if late:
        return Answers(tuple(said[1:]), f"gave no answer within {limit_s:g} s and was stopped", "timeout")
    if code:
        return Answers(tuple(said[1:]), f"ended the process it ran in ({_ending(code)}): {last}", "crash")
    return Answers(tuple(said[1:]), "", "")


def answering() -> Callable[[dict[str, Any]], None]:
    """The child's end: what sends a line. What engines print goes to stderr from now on."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        lines.write(json.dumps(fields) + "\n")
        lines.flush()

    answer({"begun": True})
    return answer


def _wait(process: subprocess.Popen[bytes], answers: IO[bytes], limit_s: float) -> bool:
    """Wait until a process has ended; return whether it takes too long for that."""
    begun, deadline = False, time.monotonic() + BEGIN_S
    while process.poll() is None:
        if not begun and os.fstat(answers.fileno()).st_size:
            begun, deadline = True, time.monotonic() + limit_s
        if time.monotonic() > deadline:
            return True
        time.sleep(POLL_S)
    return False


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """End a process if it still runs; return how it ended, None if even the system cannot end it."""
    if process.poll() is None:
        process.kill()
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            return None
    return process.returncode


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
