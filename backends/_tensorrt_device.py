"""A GPU's memory, stream and CUDA graphs, by `cuda.bindings.runtime`: all that running an engine needs beside TensorRT.

NVIDIA's own samples run engines by that package since TensorRT 10.14 (before, by pycuda), and it takes 31 MB. torch, by which
the backend `cuda` reaches the GPU, would be gigabytes beside an engine that has no need of it.

Addresses are plain integers. `Device` is what sessions ask for, so that they run in the host's memory, too, where a test has
the lowered graph computed by another engine.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._tensorrt_target import NAME, OLDEST
from .errors import ExecutionError, UnavailableError

INSTALL = "pip install 'lensc[tensorrt]'"
OLDEST_DRIVER = 13_000
"""CUDA's version of the oldest driver (r580) that the libraries of TensorRT 11 for CUDA 13 run on."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, compute capability, memory, and the version of CUDA that its driver has (`13.0`)."""

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, {self.total_bytes / 2**30:.0f} GiB, sm_{self.capability[0]}{self.capability[1]}"


class Device(Protocol):
    """Memory, and copies in the order of one stream, in which engines run as well."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory. Raises ExecutionError, with what is free, if there is not so much."""
        ...

    def free(self, address: int) -> None:
        """Give memory back. What runs is waited for."""
        ...

    def clear(self, address: int, nbytes: int) -> None:
        """Fill memory with zeros."""
        ...

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` of `width` bytes that lie a pitch apart; either side may be the device's or the host's."""
        ...

    def wait(self) -> None:
        """Wait for everything asked for. Raises ExecutionError if some of it failed."""
        ...

    def host_bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory of the host that the device copies from and to at full speed."""
        ...


def missing() -> str | None:
    """What running or compiling needs and is not here, with what would help; None if all of it seems to be. Nothing of
    NVIDIA's is imported unless it is all installed.
    """
    packages = {"tensorrt": "tensorrt", "cuda-bindings": "cuda"}
    absent = [package for package, module in packages.items() if importlib.util.find_spec(module) is None]
    if absent:
        return f"{' and '.join(absent)} not installed; {INSTALL}"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda.so.1 cannot be loaded"
    return None


def first_gpu() -> Gpu:
    """The first GPU. Raises UnavailableError that says what is missing, too old or too small, and what would help."""
    problem = missing()
    if problem:
        raise UnavailableError(f"backend {NAME} unavailable: {problem}")
    cudart = _cudart()
    error, version = cudart.cudaDriverGetVersion()
    if int(error) or version < OLDEST_DRIVER:
        found = f"has CUDA {_version(version)}" if version else "is not loaded"
        raise UnavailableError(
            f"backend {NAME} unavailable: the NVIDIA driver {found}, expected {_version(OLDEST_DRIVER)} (r580) or newer; "
            "update the driver"
        )
    error, count = cudart.cudaGetDeviceCount()
    if int(error) or not count:
        reason = _described(cudart, error) if int(error) else "there is none"
        raise UnavailableError(
            f"backend {NAME} unavailable: no NVIDIA GPU: {reason}; nvidia-smi shows what the driver sees"
        )
    properties = _checked(cudart, cudart.cudaGetDeviceProperties(0), "asking the GPU")
    _checked(cudart, cudart.cudaSetDevice(0), "choosing the GPU")
    free, total = _checked(cudart, cudart.cudaMemGetInfo(), "asking for the GPU's memory")
    capability = (int(properties.major), int(properties.minor))
    name = properties.name.decode("utf-8", "replace").rstrip("\0")
    if capability < OLDEST:
        raise UnavailableError(
            f"backend {NAME} unavailable: {name} has compute capability {capability[0]}.{capability[1]}, TensorRT 11 needs "
            f"{OLDEST[0]}.{OLDEST[1]} or newer"
        )
    return Gpu(name, capability, int(free), int(total), _version(version))


class CudaDevice:
    """See `Device`."""

    def __init__(self) -> None:
        """A stream of the current GPU. Raises ExecutionError."""
        self._cudart = _cudart()
        flags = self._cudart.cudaStreamNonBlocking
        self._stream = self._ask("making a stream", self._cudart.cudaStreamCreateWithFlags(flags))
        self._pinned: dict[int, Any] = {}

    @property
    def stream(self) -> int:
        """The handle of the stream, as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, nbytes: int) -> int:
        error, address = self._cudart.cudaMalloc(max(nbytes, 1))
        if int(error):
            free, total = self._ask("asking for the GPU's memory", self._cudart.cudaMemGetInfo())
            raise ExecutionError(
                f"the GPU has no {nbytes / 2**30:.2f} GiB left, {free / 2**30:.2f} of {total / 2**30:.1f} GiB are free; "
                "close other sessions, or use fewer beams or a scheme of fewer bits"
            )
        return int(address)

    def free(self, address: int) -> None:
        self._ask("freeing memory", self._cudart.cudaFree(address))

    def clear(self, address: int, nbytes: int) -> None:
        self._ask("clearing memory", self._cudart.cudaMemsetAsync(address, 0, nbytes, self._stream))

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        if not width or not rows:
            return
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDefault  # addresses say where they are
        if width == to_pitch == source_pitch:
            made = self._cudart.cudaMemcpyAsync(to, source, width * rows, kind, self._stream)
        else:
            made = self._cudart.cudaMemcpy2DAsync(to, to_pitch, source, source_pitch, width, rows, kind, self._stream)
        self._ask("copying", made)

    def wait(self) -> None:
        self._ask("running", self._cudart.cudaStreamSynchronize(self._stream))

    def host_bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        address = int(self._ask("pinning memory", self._cudart.cudaMallocHost(max(nbytes, 1))))
        block: Any = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address)
        self._pinned[address] = block
        array: npt.NDArray[np.uint8] = np.frombuffer(block, np.uint8)
        return array

    def begin_capture(self) -> None:
        """Record what is asked for from now on, and do not run it."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._ask("recording a CUDA graph", self._cudart.cudaStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> Any:
        """What was recorded, to be launched. Raises ExecutionError for work that cannot be recorded."""
        graph = self._ask("recording a CUDA graph", self._cudart.cudaStreamEndCapture(self._stream))
        try:
            return self._ask("making a CUDA graph", self._cudart.cudaGraphInstantiate(graph, 0))
        finally:
            self._ask("freeing a CUDA graph", self._cudart.cudaGraphDestroy(graph))

    def launch(self, graph: Any) -> None:
        """Run a recorded graph."""
        self._ask("launching a CUDA graph", self._cudart.cudaGraphLaunch(graph, self._stream))

    def drop(self, graph: Any) -> None:
        """Free a recorded graph."""
        self._ask("freeing a CUDA graph", self._cudart.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        """Free the stream and the host's memory. What the device's memory holds is its owners'."""
        if self._stream is None:
            return
        for address in self._pinned:
            self._ask("freeing memory", self._cudart.cudaFreeHost(address))
        self._pinned.clear()
        self._ask("freeing a stream", self._cudart.cudaStreamDestroy(self._stream))
        self._stream = None

    def _ask(self, what: str, result: Any) -> Any:
        return _checked(self._cudart, result, what)


def _cudart() -> Any:
    """The module. Raises UnavailableError."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"backend {NAME} unavailable: {reason}; {INSTALL}") from error
    return runtime


def _checked(cudart: Any, result: Any, what: str) -> Any:
    """What a function gave behind its error: nothing, a value or a tuple. Raises ExecutionError."""
    error, *values = result
    if int(error):
        raise ExecutionError(f"CUDA failed while {what}: {_described(cudart, error)}")
    return values[0] if len(values) == 1 else tuple(values) if values else None


def _described(cudart: Any, error: Any) -> str:
    text = cudart.cudaGetErrorString(error)[1]
    return str(text.decode() if isinstance(text, bytes) else text)


def _version(number: int) -> str:
    """13050 -> 13.5"""
    return f"{number // 1000}.{number % 1000 // 10}"
