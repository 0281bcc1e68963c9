"""A loaded graph of ONNX Runtime, and its exceptions as ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec

from .base import Array, check_feeds, check_out
from .errors import ExecutionError

MESSAGE_LENGTH = 400


class OrtSession:
    """A loaded graph. Arrays are handed to the engine by address, in and out: nothing is copied at the border."""

    def __init__(self, spec: GraphSpec, session: Any) -> None:
        self.spec = spec
        self._session: Any = session
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
        """Free the engine's session."""
        self._session = self._binding = None


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
