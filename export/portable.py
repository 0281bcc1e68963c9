"""The weights that a portable graph holds, as a `WeightSource`: what it stands for, not what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lensc.backends.base import Array
from lensc.backends.errors import GraphError

from .checkpoint import WeightSource
from .onnx import THIRDS
from .quantize.linears import SCALE, TURNED, ZERO_POINT
from .quantize.weights import unpack_bits
from .shards import TensorRecord

PIECE_BYTES = 16 << 20
"""Read at once of a weight that lies turned."""


class PortableWeights:
    """The float32 weights of the graphs in `files`, by the checkpoint's names; the rest (the table) is `checkpoint`'s.

    A quantized weight is dequantized while it is read, a few rows at a time. See `WeightSource`.
    """

    def __init__(self, files: Mapping[str, Path], checkpoint: WeightSource) -> None:
        """Read the graphs' structure. Raises GraphError if a file is no graph."""
        self._checkpoint = checkpoint
        self._tensors: dict[str, ir.TensorProtocol] = {}
        self._groups: dict[str, int] = {}
        """Inputs that share a scale, by weight; those with one scale per output are absent."""
        self._turned: set[str] = set()
        """Quantized weights that lie [inputs, outputs]."""
        for name, path in files.items():
            try:
                model = ir.load(path)
            except Exception as error:  # protobuf's own, and whatever a damaged file makes of the reader
                raise GraphError(f"graph {name}: {path} cannot be read as ONNX: {str(error)[:120]}") from error
            for key, value in model.graph.initializers.items():
                if value.const_value is not None and not key.startswith("const_"):
                    self._tensors[key] = value.const_value
            for node in model.graph:
                if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
                    continue
                if "block_size" in node.attributes:
                    self._groups[str(node.inputs[0].name)] = node.attributes["block_size"].as_int()
                elif node.attributes["axis"].as_int() == 1:
                    self._turned.add(str(node.inputs[0].name))

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Names and shapes are the checkpoint's."""
        return self._checkpoint.tensors

    @property
    def sha256(self) -> str:
        """That of the checkpoint."""
        return self._checkpoint.sha256

    def tensor(self, name: str) -> Tensor:
        """See `WeightSource.tensor`."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `WeightSource.rows`."""
        shape = self.tensors[name].shape
        if name not in self._tensors:
            if f"{name}.{THIRDS[0]}" in self._tensors:
                return self._packed(name, start, stop, shape[0] // len(THIRDS))
            return self._checkpoint.rows(name, start, stop)
        if name + SCALE not in self._tensors:
            return torch.from_numpy(self._read(name, start, stop).astype(np.float32))
        if name in TURNED:  # what is dequantized is [outputs, inputs]
            return self._dequantized(name, 0, shape[1]).T[start:stop].contiguous()
        return self._dequantized(name, start, stop)

    def _packed(self, name: str, start: int, stop: int, third: int) -> Tensor:
        """Rows of a parameter whose thirds are weights of their own."""
        parts = []
        for i, letter in enumerate(THIRDS):
            first, last = max(start - i * third, 0), min(stop - i * third, third)
            if first < last:
                key = f"{name}.{letter}"
                if key + SCALE in self._tensors:
                    parts.append(self._dequantized(key, first, last))
                else:
                    parts.append(torch.from_numpy(self._read(key, first, last).astype(np.float32)))
        return torch.cat(parts)

    def _dequantized(self, name: str, start: int, stop: int) -> Tensor:
        turned = name in self._turned
        values = self._columns(name, start, stop) if turned else self._read(name, start, stop).astype(np.float32)
        scales = self._read(name + SCALE, start, stop)
        if name + ZERO_POINT in self._tensors:
            values -= self._spread(name, self._read(name + ZERO_POINT, start, stop).astype(np.float32), values.shape[1])
        return torch.from_numpy(values * self._spread(name, scales, values.shape[1]))

    def _spread(self, name: str, per_group: Array, inputs: int) -> Array:
        """[rows] or [rows, groups] -> [rows, 1] or [rows, inputs]."""
        if per_group.ndim == 1:
            return per_group[:, None]
        return np.repeat(per_group, self._groups[name], axis=1)[:, :inputs]

    def _columns(self, name: str, start: int, stop: int) -> Array:
        """Outputs `start` to `stop` of a weight that lies [inputs, outputs], in float32, turned back."""
        inputs, outputs = (int(d) for d in self._tensors[name].shape.numpy())
        values = np.empty((stop - start, inputs), np.float32)
        step = max(1, PIECE_BYTES // outputs)
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            values[:, first:last] = self._read(name, first, last)[:, start:stop].T
        return values

    def _read(self, name: str, start: int, stop: int) -> Array:
        """Rows of an initializer, read from the file and from nowhere else; values of few bits one to a byte."""
        tensor = self._tensors[name]
        shape = tuple(int(d) for d in tensor.shape.numpy())
        if not isinstance(tensor, ir.ExternalTensor):
            return np.asarray(tensor.numpy())[start:stop]
        bits, row = tensor.dtype.bitwidth, prod(shape[1:])
        few = bits < 8
        if row * bits % 8:  # rows do not begin on bytes
            whole = np.fromfile(tensor.path, np.uint8, tensor.length or -1, offset=tensor.offset or 0)
            return unpack_bits(whole, bits)[: prod(shape)].reshape(shape)[start:stop]
        dtype = np.dtype(np.uint8) if few else tensor.dtype.numpy()
        row_bytes = row * bits // 8
        count = (stop - start) * row_bytes // dtype.itemsize
        flat = np.fromfile(tensor.path, dtype, count, offset=(tensor.offset or 0) + start * row_bytes)
        return (unpack_bits(flat, bits) if few else flat).reshape(stop - start, *shape[1:])
