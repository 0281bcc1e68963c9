"""What runs Qualcomm's libraries in a process of its own: compiling, and executing by emulation.

They may end the process they are in (loading some binaries does), print what they like, and take any time. The parent
speaks with this one through pipes: each message is a length and an .npz; an answer whose array is `error` is one.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from ._onnxruntime_session import engine_errors, one_line
from .base import Array
from .errors import ExecutionError, LensError

PROVIDER = "QNNExecutionProvider"
INDEX, INTERFACES = ".graph", ".interfaces"
"""Names of what is no tensor: the graph to run, of several; the inputs and outputs of each."""

LENGTH = struct.Struct("<Q")
LOG_BYTES = 1 << 20


class Child:
    """The parent's end. A context manager; leaving it ends the process."""

    def __init__(self, what: str, job: str, options: Mapping[str, Any], limit_s: float) -> None:
        """Start `job` (`compile` or `run`). `what` begins every error; no message may take longer than `limit_s`."""
        self._what, self._limit_s = what, limit_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        command = [sys.executable, "-P", "-m", f"{__package__}._qnn_child", job, json.dumps(dict(options))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Send a message and wait for the answer. Raises ExecutionError: it failed, crashed, or took too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._limit_s, stop)
        timer.start()
        try:
            _send(self._process.stdin, arrays)
            answer = _receive(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            code = self._process.wait()
            if late.is_set():
                problem = f"took longer than {self._limit_s:.0f} s and was stopped"
            else:
                problem = f"ended the process it ran in ({_ending(code)}): {self.last_words()}"
            raise ExecutionError(f"{self._what}: Qualcomm's library {problem}") from error
        finally:
            timer.cancel()
        if "error" in answer:
            raise ExecutionError(f"{self._what}: {answer['error']}")
        return answer

    def interfaces(self) -> list[tuple[list[str], list[str]]]:
        """Inputs and outputs of each graph of a `run`. Raises what `ask` does."""
        return [(inputs, outputs) for inputs, outputs in json.loads(str(self.ask({})[INTERFACES]))]

    def run(self, index: int, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph of `index`. Raises what `ask` does."""
        return self.ask({**feeds, INDEX: np.array(index)})

    def log(self) -> str:
        """All that the process has printed."""
        self._log.seek(0)
        return self._log.read(LOG_BYTES).decode(errors="replace")

    def last_words(self) -> str:
        """The last line it printed."""
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        return lines[-1][-300:] if lines else "it said nothing"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            # what a process has not read that ended by itself is flushed into nothing
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _send(pipe: IO[bytes], arrays: Mapping[str, Array]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    pipe.write(LENGTH.pack(buffer.tell()))
    pipe.write(buffer.getbuffer())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> dict[str, Array]:
    """The next message. Raises EOFError."""
    length = LENGTH.unpack(_exactly(pipe, LENGTH.size))[0]
    with np.load(io.BytesIO(_exactly(pipe, length)), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


# --- the child's end ----------------------------------------------------------------------------------------------


def session_options(ort: Any, provider: Mapping[str, str]) -> Any:
    """Options of a session on the NPU, or its emulation: nothing may go to the CPU in silence. Raises ExecutionError."""
    import onnxruntime_qnn

    known = {device.ep_name for device in ort.get_ep_devices()}
    if PROVIDER not in known:
        ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise ExecutionError("onnxruntime-qnn is here and offers no device")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_provider_for_devices(devices, dict(provider))
    return options


def _compile(ort: Any, job: Mapping[str, Any]) -> dict[str, Array]:
    """Write the context binary; tell which node of which graph is where."""
    shared = len(job["sources"]) > 1
    sessions: list[Any] = []  # those that share weights must be there together
    where = []
    for source, out in zip(job["sources"], job["outs"], strict=True):
        options = session_options(ort, job["provider"])
        entries = {
            "session.disable_cpu_ep_fallback": "0" if job["cpu_nodes"] else "1",
            "session.record_ep_graph_assignment_info": "1",
            "ep.context_enable": "1",
            "ep.context_file_path": out,
            "ep.context_embed_mode": "0",
        }
        if shared:
            entries["ep.share_ep_contexts"] = "1"
            entries["ep.stop_share_ep_contexts"] = str(int(out == job["outs"][-1]))
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        sessions.append(ort.InferenceSession(source, sess_options=options, enable_fallback=0))
        parts = sessions[-1].get_provider_graph_assignment_info()
        where.append({node.name: [node.op_type, part.ep_name] for part in parts for node in part.get_nodes()})
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"where": np.array(json.dumps(where)), "peak_bytes": np.array(peak)}


def open_session(
    ort: Any, path: str, provider: Mapping[str, str], cpu_nodes: Collection[str], shares: bool = False
) -> Any:
    """A session on the NPU, or its emulation, that runs on the CPU nothing but `cpu_nodes`.

    `shares`: its binary holds other graphs, too, whose sessions are opened in this process.
    """
    options = session_options(ort, provider)
    if shares:
        options.add_session_config_entry("ep.share_ep_contexts", "1")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if cpu_nodes else "1")
    session = ort.InferenceSession(path, sess_options=options, enable_fallback=0)
    # a run that fails would be repeated on the CPU
    session.disable_fallback()
    return session


def interface(session: Any) -> tuple[list[str], list[str]]:
    """The names of inputs and outputs."""
    return [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]


def _run(ort: Any, job: Mapping[str, Any], feeds: IO[bytes], answers: IO[bytes]) -> None:
    sessions = [open_session(ort, source, job["provider"], job["cpu_nodes"]) for source in job["sources"]]
    interfaces = [interface(session) for session in sessions]
    while True:
        try:
            arrays = _receive(feeds)
        except EOFError:
            return
        if not arrays:  # asked whether it is loaded
            _send(answers, {INTERFACES: np.array(json.dumps(interfaces))})
            continue
        index = int(arrays.pop(INDEX))
        names = interfaces[index][1]
        _send(answers, dict(zip(names, sessions[index].run(names, arrays), strict=True)))


def main(arguments: Sequence[str]) -> None:
    """Do the job of the command line; whatever fails is an answer."""
    # the library prints to stdout
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = json.loads(arguments[1])
    try:
        import onnxruntime as ort

        with engine_errors("onnxruntime-qnn"):
            if arguments[0] == "compile":
                _receive(sys.stdin.buffer)
                _send(answers, _compile(ort, job))
            else:
                _run(ort, job, sys.stdin.buffer, answers)
    except (LensError, OSError, ImportError, MemoryError) as error:
        _send(answers, {"error": np.array(one_line(error))})


if __name__ == "__main__":
    main(sys.argv[1:])
