"""A loaded graph on OpenVINO, and what all of the backend needs: the engine's module and its errors in one line."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec

from .base import Array, check_feeds, check_out, writeable
from .errors import ExecutionError, UnavailableError

NAME = "openvino"
INSTALL = "pip install 'lensc[openvino]'"

MESSAGE_LENGTH = 400

MADV_DONTNEED = 4
"""Linux's number, from its header mman-common.h."""

_WHERE = re.compile(r"(?:Exception from|Check '[^']*' failed at) \S+:\d+:\s*|FrontEnd API failed with \w+:\s*")
"""Where in OpenVINO's source a message was made, which stands before it at every level."""


def engine() -> Any:
    """The openvino module. Raises UnavailableError that says how to install it."""
    try:
        import openvino

        return openvino
    except ImportError as error:
        raise UnavailableError(f"backend {NAME} unavailable: {' '.join(str(error).split())}; {INSTALL}") from error


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn the engine's exceptions into ExecutionError of one line."""
    from openvino import frontend

    failures = ("GeneralFailure", "InitializationFailure", "NotImplementedFailure", "OpConversionFailure",
                "OpValidationFailure")  # fmt: skip
    kinds = tuple(getattr(frontend, name) for name in failures)
    try:
        yield
    except (*kinds, RuntimeError, ValueError, TypeError) as error:
        raise ExecutionError(f"{what}: openvino failed: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The message of an error of the engine, without its places in the source, cut to a length one can read."""
    text = " ".join(_WHERE.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"


def bind(request: Any, arrays: Mapping[str, Array]) -> None:
    """Let `request` read and write `arrays`, C-contiguous and writeable, where they are. They must outlive the run."""
    ov = engine()
    for name, array in arrays.items():
        request.set_tensor(name, ov.Tensor(array, shared_memory=True))


def readable(array: Array) -> Array:
    """`array` if the engine can read it in place, else a copy: it refuses memory that it could not write to."""
    return array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")


class Weights:
    """The files that a compiled model maps its weights from."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {os.path.realpath(path) for path in paths}

    def used(self) -> None:
        """To be called after a run: gives the memory of the files back, once.

        The first run packs weights into memory of the engine's own and never looks at the files again, but their pages
        would stay in this process's memory: 4 GB of an 8 GB decoder. A page that is needed after all is read again.
        Only Linux is told; elsewhere the system finds out by itself when memory is short.
        """
        paths, self._paths = self._paths, set()
        if not paths or sys.platform != "linux":
            return
        advise = ctypes.CDLL(None).madvise
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                addresses, access, *_, name = line.rstrip("\n").split(maxsplit=5)
                # what this process has written to is not in the file
                if name in paths and "w" not in access:
                    start, end = (int(address, 16) for address in addresses.split("-"))
                    advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


class OpenVINOSession:
    """A graph without states. Arrays are handed to the engine by address, in and out."""

    def __init__(self, spec: GraphSpec, compiled: Any, weights: Weights) -> None:
        self.spec = spec
        self._request: Any = compiled.create_infer_request()
        self._weights = weights

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once; see `Session.run`. Feeds that are not C-contiguous or read-only are copied."""
        if self._request is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        outputs = writeable(self.spec, check_out(self.spec, sizes, given), given)
        inputs = {name: readable(array) for name, array in feeds.items()}
        with engine_errors(f"graph {self.spec.name}"):
            bind(self._request, inputs)
            bind(self._request, outputs)
            self._request.infer()
        self._weights.used()
        return outputs

    def close(self) -> None:
        """Free what the engine holds."""
        self._request = None
