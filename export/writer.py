"""A traced graph and the weights of a checkpoint -> an ONNX file and its data file, a few rows at a time.

Weights are read, quantized and written in pieces of `PIECE_BYTES`, so the memory taken does not depend on the model.
An interrupted run goes on behind the last weight that is complete.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from lensc.backends.errors import GraphError, InputError, StorageError

from .data_file import COPY_BYTES, JOURNAL, DataFile, Extent
from .quantize.linears import SCALE, ZERO_POINT, Linear, find_linears, quantize_linears
from .quantize.weights import QuantizedWeight, WeightFormat, pack, pack_zero_points, quantize_rtn

DATA_SUFFIX = ".data"

INLINE_BYTES = 1024
"""Tensors up to this size stay in the ONNX file, so that shapes and scalars can be read without the data file."""

PIECE_BYTES = 32 << 20
"""Of float32, at once."""

ALIGNMENT = 64
"""Of scales and zero points, which follow their values: a cache line."""

Rows = Callable[[str, int, int], Tensor]
"""Rows `start` to `stop` of the parameter of a name, as stored, on the CPU."""

Quantize = Callable[[str, Tensor, WeightFormat, int], QuantizedWeight]
"""Rows of a weight from row `start` on, float32[rows, inputs], in the given format."""


def round_to_nearest(name: str, rows: Tensor, format: WeightFormat, start: int) -> QuantizedWeight:
    """The `Quantize` that needs no data."""
    return quantize_rtn(rows, format)


@dataclass(frozen=True)
class Parameter:
    """Where the rows of an initializer come from: those of the parameter `base` from `first` on, or its columns."""

    base: str
    shape: tuple[int, ...]
    first: int = 0
    columns: bool = False


def write_graph(
    model: ir.Model,
    path: Path,
    parameters: Mapping[str, Parameter],
    rows: Rows,
    formats: Mapping[str, WeightFormat] | None = None,
    quantize: Quantize = round_to_nearest,
    *,
    key: str = "",
    progress: Callable[[str], None] | None = None,
) -> str:
    """Write `model` to `path` and the values of its `parameters` beside it; return the SHA-256 of model then data.

    Weights named in `formats` are quantized. `key` names what the values follow from: a run with the same key goes on
    where an earlier one was interrupted; without a key nothing is left of an interrupted run. `progress` is called with the name of each weight that is written. Raises GraphError for
    rows that do not fit or hold NaN or Inf, StorageError if the files cannot be written; they are replaced only by
    complete ones.
    """
    formats = formats or {}
    linears = find_linears(model, parameters)
    quantize_linears(model, linears, formats)
    siblings = _siblings([linears[name] for name in parameters if name in formats], formats)
    data = path.with_name(path.name + DATA_SUFFIX)
    partial = path.with_name(path.name + DATA_SUFFIX + ".partial")
    try:
        written = False
        with DataFile(partial, key) as file:
            for name, parameter in parameters.items():
                if name not in model.graph.initializers:
                    continue
                if name in formats:
                    if name in siblings:
                        together = siblings[name]
                        read = [(linear, parameters[linear.name]) for linear in together]
                        source = _quantized(read, formats[name], rows, quantize)
                        extent = file.write(" ".join(linear.name for linear in together), source)
                        _place_quantized(model, together, formats[name], extent, data)
                    written = True
                else:
                    written |= _write_float(model, name, parameter, rows, file, data)
                if progress is not None:
                    progress(name)
            file.finish()
        return _publish(model, path, data, partial, written)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if not key:  # nobody can go on with it
            for left in (partial, partial.with_name(partial.name + JOURNAL)):
                left.unlink(missing_ok=True)


# --- float weights --------------------------------------------------------------------------------------------------


def _write_float(model: ir.Model, name: str, parameter: Parameter, rows: Rows, file: DataFile, data: Path) -> bool:
    """Write a weight that stays as it is; small ones go into the model. Returns whether the data file has it."""
    value = model.graph.initializers[name]
    assert value.dtype is not None
    if 4 * int(np.prod(parameter.shape)) <= INLINE_BYTES:
        arrays = [piece.numpy() for piece in _pieces(parameter, rows, name)]
        value.const_value = ir.Tensor(np.concatenate(arrays).reshape(parameter.shape), name=name)
        return False
    extent = file.write(name, lambda: (_bytes(piece.numpy()) for piece in _pieces(parameter, rows, name)))
    value.const_value = _external(data, name, value.dtype, parameter.shape, extent.offset, extent.bytes)
    return True


def _pieces(parameter: Parameter, rows: Rows, name: str) -> Iterator[Tensor]:
    """The parameter in float32, a few rows at a time. Raises GraphError."""
    outputs = parameter.shape[0]
    if parameter.columns:
        yield _checked(rows(parameter.base, 0, parameter.shape[1]), name, parameter.shape[::-1]).T.contiguous()
        return
    step = max(1, PIECE_BYTES // (4 * int(np.prod(parameter.shape[1:]))))
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        first = parameter.first
        yield _checked(rows(parameter.base, first + start, first + stop), name, (stop - start, *parameter.shape[1:]))


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise GraphError(f"weight {name}: expected rows {list(shape)} of floats, got {dtype}{list(tensor.shape)}")
    tensor = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise GraphError(
            f"weight {name}: holds NaN or Inf in float32; the checkpoint is damaged or its training diverged"
        )
    return tensor


# --- quantized weights ----------------------------------------------------------------------------------------------


def _siblings(linears: Sequence[Linear], formats: Mapping[str, WeightFormat]) -> dict[str, list[Linear]]:
    """Linears that follow each other, read the same value in the same format and lie by rows, by the first one's name.

    Their bytes lie together, as if they were one weight: an engine can compute their products as one.
    """
    found: dict[str, list[Linear]] = {}
    last: list[Linear] = []
    for linear in linears:
        format = formats[linear.name]
        alike = last and (last[0].reads, formats[last[0].name]) == (linear.reads, format)
        if alike and not format.is_turned(linear.inputs):
            last.append(linear)
        else:
            last = found[linear.name] = [linear]
    return found


def _quantized(
    together: Sequence[tuple[Linear, Parameter]], format: WeightFormat, rows: Rows, quantize: Quantize
) -> Callable[[], Iterator[bytes | memoryview]]:
    """The bytes of all values, then of all scales, then of all zero points."""

    def pieces() -> Iterator[bytes | memoryview]:
        scales: list[Tensor] = []
        zeros: list[npt.NDArray[np.uint8]] = []
        count = 0
        for linear, parameter in together:
            start = len(scales)
            zero_points: list[Tensor] = []
            for values in _values(linear, parameter, format, rows, quantize, scales, zero_points):
                count += len(values)
                yield values
            whole = torch.cat(zero_points) if zero_points else None
            packed = pack_zero_points(QuantizedWeight(torch.empty(0), torch.cat(scales[start:]), whole, format))
            zeros += [] if packed is None else [packed]
        yield bytes(-count % ALIGNMENT)
        for part in scales:
            yield _bytes(part.numpy())
        if zeros:
            yield bytes(-4 * sum(part.numel() for part in scales) % ALIGNMENT)
            for packed in zeros:
                yield _bytes(packed)

    return pieces


def _values(
    linear: Linear,
    parameter: Parameter,
    format: WeightFormat,
    rows: Rows,
    quantize: Quantize,
    scales: list[Tensor],
    zero_points: list[Tensor],
) -> Iterator[memoryview]:
    """The bytes of a weight's values, a few rows at a time; its scales and zero points are appended to those given.

    Values that lie turned are held until all are known.
    """
    turned = np.empty((linear.inputs, linear.outputs) if format.is_turned(linear.inputs) else 0, np.uint8)
    read = Parameter(parameter.base, (linear.outputs, linear.inputs), parameter.first, linear.transposed)
    start = 0
    for piece in _pieces(read, rows, linear.name):
        try:
            made = quantize(linear.name, piece, format, start)
        except InputError as error:
            raise GraphError(f"weight {linear.name}: {error}") from error
        scales.append(made.scales)
        if made.zero_points is not None:
            zero_points.append(made.zero_points)
        if turned.size:
            turned[:, start : start + len(piece)] = pack(made).T
        else:
            yield _bytes(pack(made))
        start += len(piece)
    if turned.size:
        yield _bytes(turned)


def _place_quantized(
    model: ir.Model, together: Sequence[Linear], format: WeightFormat, extent: Extent, data: Path
) -> None:
    """Let the three initializers of each of several weights point into the data file, where `_quantized` put them."""
    bits, groups = format.container_bits, {linear.name: format.groups(linear.inputs) for linear in together}
    parts = [
        {linear.name: linear.outputs * -(-linear.inputs * bits // 8) for linear in together},
        {linear.name + SCALE: 4 * linear.outputs * groups[linear.name] for linear in together},
    ]
    if not format.is_signed:
        zeros = {linear.name + ZERO_POINT: -(-linear.outputs * groups[linear.name] * bits // 8) for linear in together}
        parts.append(zeros)
    offset = 0
    for sizes in parts:
        for name, nbytes in sizes.items():
            value = model.graph.initializers[name]
            assert value.dtype is not None and isinstance(value.shape, ir.Shape)
            shape = tuple(int(d) for d in value.shape.numpy())
            value.const_value = _external(data, name, value.dtype, shape, extent.offset + offset, nbytes)
            offset += nbytes
        offset += -offset % ALIGNMENT


# --- files ----------------------------------------------------------------------------------------------------------


def _external(
    data: Path, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, nbytes: int
) -> ir.TensorProtocol:
    return ir.ExternalTensor(
        data.name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=str(data.parent)
    )


def _bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _publish(model: ir.Model, path: Path, data: Path, partial: Path, has_data: bool) -> str:
    """Write the model, put both files in place, the data first; return the hash of both."""
    temporary = path.with_name(path.name + ".partial")
    ir.save(model, temporary)
    digest = hashlib.sha256()
    for file in (temporary, partial):
        with open(file, "rb") as opened:
            while piece := opened.read(COPY_BYTES):
                digest.update(piece)
    if has_data:
        os.replace(partial, data)
    else:
        partial.unlink()
    os.replace(temporary, path)
    return digest.hexdigest()
