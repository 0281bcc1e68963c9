"""A loaded graph of ONNX Runtime, the weights that it borrows, and its exceptions as ours."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec

from .base import Array, check_feeds, check_out
from .errors import ExecutionError
from .files import give_back, map_file

MESSAGE_LENGTH = 400

SWEEP_S = 0.05
"""How often pages that were packed are given back while a graph is loaded: about 100 MB in between."""


class Weights:
    """The data files of a graph, mapped once and read only, for the engine to borrow: it copies none of them.

    The engine packs most weights into memory of its own and never looks at the file again, but pages that were read stay
    in this process's memory until somebody says that they are not needed: without that, loading takes twice the memory
    of the weights. A page that is needed after all is read again.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Map `files`. Raises ExecutionError if one cannot be read."""
        self._maps = {path: map_file(path) for path in files}

    def lend(self, options: Any, model: Path) -> None:
        """Let a session with these `options` use the maps for what `model` names by its external data's location."""
        names = [Path(os.path.relpath(path, model.parent)).as_posix() for path in self._maps]
        options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
        options.add_external_initializers_from_files_in_memory(
            names, list(self._maps.values()), [len(m) for m in self._maps.values()]
        )

    @contextmanager
    def being_packed(self) -> Iterator[None]:
        """Give pages back while, and after, the engine packs what is in them."""
        done = threading.Event()

        def sweep() -> None:
            while not done.wait(SWEEP_S):
                self._release()

        sweeper = threading.Thread(target=sweep, name="lensc-weights", daemon=True)
        sweeper.start()
        try:
            yield
        finally:
            done.set()
            sweeper.join()
            self._release()

    def _release(self) -> None:
        for mapped in self._maps.values():
            give_back(mapped)


class OrtSession:
    """A loaded graph. Arrays are handed to the engine by address, in and out: nothing is copied at the border."""

    def __init__(self, spec: GraphSpec, session: Any, weights: Weights) -> None:
        """`weights` must outlive `session`, which reads them in place."""
        self.spec = spec
        self._session: Any = session
        self._weights: Weights | None = weights
        self._binding: Any = session.io_binding()
        self._dtypes = {t.name: np.dtype(t.dtype).type for t in (*spec.inputs, *spec.outputs)}

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once; see `Session.run`. Feeds that are not C-contiguous are copied, all others are read in place."""
        if self._session is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        inputs = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        outputs = {
            name: given[name] if name in given else np.empty(shape, self._dtypes[name])
            for name, shape in shapes.items()
        }
        try:
            with engine_errors(f"graph {self.spec.name}"):
                for name, array in inputs.items():
                    self._binding.bind_input(name, "cpu", 0, self._dtypes[name], array.shape, array.ctypes.data)
                for name, array in outputs.items():
                    self._binding.bind_output(name, "cpu", 0, self._dtypes[name], array.shape, array.ctypes.data)
                self._session.run_with_iobinding(self._binding)
        finally:
            # a binding keeps addresses, not arrays: none may outlive this call
            self._binding.clear_binding_inputs()
            self._binding.clear_binding_outputs()
        return outputs

    def close(self) -> None:
        """Free the engine's session, then the weights that it borrows."""
        self._session = self._binding = None
        self._weights = None


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn the engine's exceptions into ExecutionError of one line."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile",
        "NotFound", "NotImplemented", "RuntimeException",
    )  # fmt: skip
    kinds = tuple(getattr(state, name) for name in names if hasattr(state, name))
    try:
        yield
    except (*kinds, RuntimeError, ValueError) as error:
        raise ExecutionError(f"{what}: onnxruntime failed: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an exception says, without line breaks, cut if it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"
