"""The ONNX files that are sent to Qualcomm AI Hub and that come back: one slice at fixed shapes, in zipped folders."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from lensc.backends.base import Array, sha256_file
from lensc.backends.errors import ExecutionError, UnsupportedError

from .graph import Graph

MASKED = -100.0
"""exp(-100) is 0 in float32, and unlike the runtime's -1e4 it leaves a quantized range its resolution."""

WriteFixed = Callable[[Graph, Path], int]
"""Writes a graph for one slice at fixed shapes as ONNX, data in a file beside it; returns its multiply-adds."""


@dataclass(frozen=True)
class Interface:
    """The interface of an ONNX file at fixed shapes: dtype and shape of each input, and the names of outputs."""

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[str, ...]


def write_package(graph: Graph, package: Path, write_fixed: WriteFixed) -> tuple[tuple[str, int], list[Path]]:
    """The graph at fixed shapes as the service takes it: a zipped folder of one ONNX file and one of data.

    Returns the zip's SHA-256 and the graph's multiply-adds. Raises UnsupportedError for anything else.
    """
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        products = write_fixed(graph, Path(scratch) / "vision.onnx")
        files = sorted(Path(scratch).iterdir())
        kinds = sorted(path.suffix for path in files)
        if kinds not in ([".onnx"], [".data", ".onnx"]):
            raise UnsupportedError(
                f"graph {graph.spec.name} at fixed shapes: {', '.join(p.name for p in files)}: "
                "the service takes one .onnx file, with at most one .data file"
            )
        interface(next(path for path in files if path.suffix == ".onnx"))
        zip_files(files, package)
    return (sha256_file(package), products), [package]


def split(feeds: Mapping[str, Array], fixed: Interface) -> list[dict[str, Array]]:
    """The feeds of the portable vision graph as feeds of one slice each at fixed shapes.

    Patches that are missing up to the fixed number are zeros that no key sees. Raises UnsupportedError for a slice
    with more patches than that, or another interface.
    """
    absent = sorted(fixed.inputs.keys() ^ feeds.keys())
    if absent:
        raise UnsupportedError(f"the artifact has other inputs than the graph: {', '.join(absent)}")
    slices = []
    for i in range(next(iter(feeds.values())).shape[0]):
        one = {}
        for name, (dtype, shape) in fixed.inputs.items():
            array = feeds[name][i : i + 1]
            if array.ndim != len(shape) or any(a > s for a, s in zip(array.shape, shape, strict=True)):
                raise UnsupportedError(f"{name}: a slice of {list(array.shape)}, the artifact takes {list(shape)}")
            is_bias = name.endswith("_bias")
            padded = np.full(shape, MASKED if is_bias else 0, dtype)
            padded[tuple(slice(n) for n in array.shape)] = np.maximum(array, MASKED) if is_bias else array
            one[name] = padded
        slices.append(one)
    return slices


def unpack(file: Path, folder: Path, slug: str) -> list[Path]:
    """Put a downloaded model into `folder` under the target's name, ONNX file first. Raises ExecutionError if it is cut short."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types

    damaged = "AI Hub: the compiled model that was downloaded is damaged"
    try:
        with zipfile.ZipFile(file) as packed:
            if (bad := packed.testzip()) is not None:
                raise ExecutionError(f"{damaged}: {bad} has a wrong checksum; run the same command again")
            names = [name for name in packed.namelist() if not name.endswith("/")]
            by_kind = {Path(name).suffix: name for name in names}
            if len(names) != 2 or by_kind.keys() != {".onnx", ".bin"}:
                raise ExecutionError(f"{damaged}: it holds {', '.join(names) or 'nothing'}, expected .onnx and .bin")
            wrapper, binary = folder / f"{slug}.onnx", folder / f"{slug}.bin"
            model = onnx.ModelProto.FromString(packed.read(by_kind[".onnx"]))
            with packed.open(by_kind[".bin"]) as source, open(binary, "wb") as to:
                shutil.copyfileobj(source, to, 1 << 20)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, DecodeError) as error:
        raise ExecutionError(f"{damaged}: {error}; run the same command again") from error
    nodes = [node for node in model.graph.node if node.op_type == "EPContext"]
    if not nodes:
        raise ExecutionError(f"{damaged}: its ONNX file names no context binary")
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "ep_cache_context":
                attribute.s = binary.name.encode()
    wrapper.write_bytes(model.SerializeToString())
    return [wrapper, binary]


def interface(path: Path) -> Interface:
    """Inputs and outputs of an ONNX file. Raises UnsupportedError for a dimension that is not fixed."""
    return _fixed(onnx.load(path, load_external_data=False), path.name)


def interface_of_package(package: Path) -> Interface:
    """The same of the ONNX file in a package."""
    with zipfile.ZipFile(package) as packed:
        name = next(name for name in packed.namelist() if name.endswith(".onnx"))
        return _fixed(onnx.ModelProto.FromString(packed.read(name)), name)


def _fixed(model: onnx.ModelProto, name: str) -> Interface:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for value in model.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.WhichOneof("value") == "dim_value" else 0 for d in tensor.shape.dim)
        if not all(shape):
            raise UnsupportedError(
                f"{name}: input {value.name} has a dimension that is not fixed; the service needs all"
            )
        inputs[value.name] = (str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)
    return Interface(inputs, tuple(value.name for value in model.graph.output))


def zip_files(files: Sequence[Path], package: Path) -> None:
    """Store files in one folder of a zip. The same files make the same bytes: no times, no compression."""
    with zipfile.ZipFile(package, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(files):
            with (
                open(path, "rb") as source,
                packed.open(zipfile.ZipInfo(f"vision.onnx/{path.name}"), "w", force_zip64=True) as to,
            ):
                shutil.copyfileobj(source, to, 1 << 20)
