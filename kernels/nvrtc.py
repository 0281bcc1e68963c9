"""CUDA C++ of ours, compiled where it runs by NVRTC, which comes with torch: no compiler of the vendor's is needed.

A kernel is compiled once per process for each set of definitions, and kept in the user's cache folder for the next.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lensc.backends.errors import UnavailableError

Argument = tuple[Any, Any]
"""A value and its ctypes type; for a pointer an address, 0 for none, and c_void_p."""


def binary(source: Path, definitions: Mapping[str, int], arch: str) -> bytes:
    """The cubin of a source file for `arch`, e.g. sm_90. Needs no GPU. Raises UnavailableError with the compiler's words."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise UnavailableError(
            f"NVRTC cannot be loaded ({error}); install it with: pip install 'lensc[cuda]'"
        ) from error
    text = source.read_bytes()
    headers = [(name, (source.parent / name.decode()).read_bytes()) for name in re.findall(rb'#include "(.*?)"', text)]
    options = [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{name}={n}" for name, n in definitions.items())]
    version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    key = hashlib.sha256(
        b"\0".join([text, *(part for _, part in headers), version.encode(), *(o.encode() for o in options)])
    ).hexdigest()
    kept = _cache_folder() / f"{source.stem}-{key[:32]}.cubin"
    if kept.exists():
        return kept.read_bytes()
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            text, source.name.encode(), len(headers), [part for _, part in headers], [name for name, _ in headers]
        ),
        source,
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), source)
            nvrtc.nvrtcGetProgramLog(program, log)
            words = " ".join(log.decode(errors="replace").replace("\0", "").split())
            raise UnavailableError(f"{source.name} for {arch}: NVRTC {version} refuses it: {words[:500]}")
        made: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), source)
        nvrtc.nvrtcGetCUBIN(program, made)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    _keep(kept, made)
    return made


class Kernel:
    """A kernel on the current device, ready to be launched into a stream, also while that is captured."""

    def __init__(self, source: Path, name: str, definitions: Mapping[str, int], arch: str) -> None:
        """Compile it or take what was kept. Raises UnavailableError."""
        from cuda.bindings import driver

        self._driver = driver
        self._module = _checked(driver.cuModuleLoadData(binary(source, definitions, arch)), source)
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()), source)
        self._shared_bytes = 0
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        self._attributes = [early]

    def launch(self, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Argument], stream: int) -> None:
        """Start it. It begins while the kernel before it ends, and must wait for that itself (griddepcontrol.wait)."""
        driver = self._driver
        if shared_bytes > self._shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes), self)
            self._shared_bytes = shared_bytes
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = stream
        config.attrs, config.numAttrs = self._attributes, 1
        values, types = zip(*arguments, strict=True)
        _checked(driver.cuLaunchKernelEx(config, self._function, (values, types), 0), self)


@functools.cache
def kernel(source: Path, name: str, definitions: tuple[tuple[str, int], ...], device: int, arch: str) -> Kernel:
    """The one kernel of a process and device. Raises UnavailableError."""
    return Kernel(source, name, dict(definitions), arch)


POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def _checked(result: tuple[Any, ...], what: object) -> Any:
    """What a call of NVIDIA's bindings returned behind its status. Raises UnavailableError for an error."""
    status, *rest = result
    if int(status) != 0:
        raise UnavailableError(f"{what}: {status!r}")
    return rest[0] if len(rest) == 1 else tuple(rest)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lensc"


def _keep(path: Path, made: bytes) -> None:
    """Write a file for the next process, if that is possible: it is only quicker with it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(made)
        os.replace(file.name, path)
    except OSError:
        pass
