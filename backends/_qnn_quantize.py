"""The float graph of an NPU with the ranges of its activations -> the same graph in integers, as QuantizeLinear and
DequantizeLinear pairs around every operator.

Weights keep the integers the portable graph has. Activations take the whole range they were seen in: unsigned, 16 or 8
bits, one scale a tensor. An operator that only moves values hands on its input's scale, as the HTP demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._qnn_form import BIASES, HIDDEN, is_state
from ._qnn_functions import constant
from .base import Array
from .errors import GraphError

Range = tuple[float, float]

MOVES = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather", "Slice"}
"""Operators whose output holds values of their first input."""

LEVELS = {8: 255, 16: 65535}
SIGNED_LEVELS = 32767
NORMS = ("LayerNormalization", "RMSNormalization")

WIDE_ARCH = 73
"""From this generation on, the HTP multiplies activations of 16 bits by others of 16 bits, if those are symmetric. Unsigned
ones it rounds to 8, without a word: 39 dB are left of a product, by emulation, where symmetric ones leave 70. The one before
that we know, v68, has neither float16 nor weights of 4 bits in groups."""

MARGIN = {8: 1.0, 16: 1.25}
"""How much wider than seen: what is clipped costs more than a third of a bit of 16 does, of 8 it does not."""

LOGITS_MARGIN = 2.0
"""For logits: where the two highest are clipped, they are equal."""

SMALLEST = 1e-6
"""Width of a range that is a point."""


def quantize(model: Any, ranges: Mapping[str, Range], bits: int, htp_arch: int) -> dict[str, float]:
    """Quantize an `onnx_ir.Model` made by `_qnn_lower.lower` in place, activations to 8 or 16 `bits`.

    From `htp_arch` 73 on, the second operand of a product of two activations is signed and symmetric, and norms' weights
    have 16 bits; before, the HTP takes neither.

    A decoder's keys and values are int16 where they enter and leave; their scales are returned, by output. Raises GraphError
    for a value without a range.
    """
    return _Quantizer(model.graph, ranges, bits, htp_arch >= WIDE_ARCH).run()


def grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """(scale, zero point) of `bits` unsigned over a range, which is widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, SMALLEST) / LEVELS[bits]
    return float(np.float32(scale)), round(-low / scale)


class _Quantizer:
    def __init__(self, graph: Any, ranges: Mapping[str, Range], bits: int, wide: bool) -> None:
        import onnx_ir as ir

        self._ir, self._graph, self._bits, self._wide = ir, graph, bits, wide
        self._ranges = dict(ranges) | {name: (HIDDEN, 0.0) for name in BIASES}
        self._grids: dict[str, tuple[float, int]] = {}
        self._signed: dict[str, float] = {}
        """Scales of values that are signed and symmetric already, by the name they have behind DequantizeLinear."""

    def run(self) -> dict[str, float]:
        """Quantize; return the scale of each state by the name of its output."""
        ir, nodes = self._ir, list(self._graph)
        scales = self._join_ranges(nodes)
        for value in list(self._graph.inputs):
            if is_state(value.name):
                self._wrap_past(value, scales[value.name.removeprefix("past_")], nodes[0])
            elif value.dtype == ir.DataType.FLOAT:
                self._grids[value.name] = self._grid_of(value)
                self._wrap(value, nodes[0])
        for node in nodes:
            if node.op_type == "DequantizeLinear":
                continue
            for i, value in enumerate(node.inputs):
                if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT:
                    node.replace_input_with(i, self._quantized_constant(node, i, value))
            if node.op_type == "MatMul" and self._bits == 16 and self._wide:
                self._make_symmetric(node)
            output = node.outputs[0]
            source = self._source(node.inputs[0])
            if node.inputs[0].name in self._signed and node.op_type == "Concat":
                self._sign(output, self._signed[node.inputs[0].name])
                continue
            moved = node.op_type in MOVES and source in self._grids
            self._grids[output.name] = self._grids[source] if moved else self._grid_of(output)
            name = output.name
            self._wrap(output, None)
            if is_state(name):
                self._sign(self._graph.outputs[self._index_of_output(name)], scales[name])
        return scales

    def _join_ranges(self, nodes: Sequence[Any]) -> dict[str, float]:
        """Give what is put behind one another one range; return the scales of states, new and old rows alike."""
        scales = {}
        for node in nodes:
            if node.op_type != "Concat":
                continue
            names = [value.name for value in (*node.inputs, node.outputs[0])]
            known = [self._range_of(name) for name in names]
            joined = min(low for low, _ in known), max(high for _, high in known)
            if is_state(names[1]):
                scales[names[1]] = max(-joined[0], joined[1], SMALLEST) * MARGIN[self._bits] / SIGNED_LEVELS
            else:
                self._ranges |= dict.fromkeys(names, joined)
        return scales

    def _source(self, value: Any) -> str:
        """The name of the value that a Q, DQ pair in front of `value` was made for."""
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            quantize = producer.inputs[0].producer()
            return str(quantize.inputs[0].name if quantize is not None else producer.inputs[0].name)
        return str(value.name)

    def _range_of(self, name: str) -> Range:
        if name not in self._ranges:
            raise GraphError(f"no range was measured for {name}; calibrate the graph again")
        return self._ranges[name]

    def _grid_of(self, value: Any) -> tuple[float, int]:
        low, high = self._range_of(value.name)
        margin = 1.0 if value.name in BIASES else LOGITS_MARGIN if value.name == "logits" else MARGIN[self._bits]
        return grid(low * margin, high * margin, self._bits)

    def _wrap(self, value: Any, before: Any | None) -> None:
        """Put Q and DQ behind `value`; its readers, and the graph's output, get what comes out."""
        ir = self._ir
        params = self._parameters(value.name, self._grids[value.name], self._bits)
        readers = list(value.uses())
        q = ir.Node("", "QuantizeLinear", [value, *params], num_outputs=1)
        q.outputs[0].name = f"{value.name}.q"
        q.outputs[0].type, q.outputs[0].shape = ir.TensorType(ir.DataType[f"UINT{self._bits}"]), value.shape
        dq = ir.Node("", "DequantizeLinear", [q.outputs[0], *params], num_outputs=1)
        dq.outputs[0].type, dq.outputs[0].shape = value.type, value.shape
        if before is not None:
            self._graph.insert_before(before, [q, dq])
        else:
            self._graph.insert_after(value.producer(), [q, dq])
        dq.outputs[0].name = f"{value.name}.dq"
        for use in readers:
            use.node.replace_input_with(use.idx, dq.outputs[0])
        if value.is_graph_output():
            index = self._index_of_output(value.name)
            name, value.name = value.name, f"{value.name}.float"
            dq.outputs[0].name = name
            self._graph.outputs[index] = dq.outputs[0]

    def _make_symmetric(self, product: Any) -> None:
        """Let the second operand, if it is an activation, go through int16 without a zero point."""
        value = product.inputs[1]
        source = self._source(value)
        if value.name in self._signed or value.producer().inputs[0].is_initializer():
            return  # symmetric already, or a weight
        scale, zero = self._grids[source]
        q, dq = self._signed_pair(value, f"{source}.signed", scale * max(zero, LEVELS[16] - zero) / SIGNED_LEVELS)
        self._graph.insert_before(product, [q, dq])
        product.replace_input_with(1, dq.outputs[0])

    def _signed_pair(self, value: Any, name: str, scale: float) -> tuple[Any, Any]:
        """Q and DQ of `value` in int16 without a zero point."""
        ir = self._ir
        params = self._signed_parameters(name, scale)
        q = ir.Node("", "QuantizeLinear", [value, *params], num_outputs=1)
        q.outputs[0].name, q.outputs[0].type = f"{name}.q", ir.TensorType(ir.DataType.INT16)
        dq = ir.Node("", "DequantizeLinear", [q.outputs[0], *params], num_outputs=1)
        dq.outputs[0].name, dq.outputs[0].type = f"{name}.dq", value.type
        q.outputs[0].shape = dq.outputs[0].shape = value.shape
        return q, dq

    def _signed_parameters(self, name: str, scale: float) -> list[Any]:
        return [
            self._register(np.array(scale, np.float32), f"{name}.scale"),
            self._register(np.array(0, np.int16), f"{name}.zero"),
        ]

    def _wrap_past(self, value: Any, scale: float, before: Any) -> None:
        """Old rows of a state come as int16."""
        ir, readers = self._ir, list(value.uses())
        dq = ir.Node("", "DequantizeLinear", [value, *self._signed_parameters(value.name, scale)], num_outputs=1)
        dq.outputs[0].name = f"{value.name}.dq"
        dq.outputs[0].type, dq.outputs[0].shape = value.type, value.shape
        value.type = ir.TensorType(ir.DataType.INT16)
        self._graph.insert_before(before, dq)
        for use in readers:
            use.node.replace_input_with(use.idx, dq.outputs[0])
        self._signed[dq.outputs[0].name] = scale

    def _sign(self, value: Any, scale: float) -> None:
        """Let the readers of `value` have it as int16, and the graph's output be those integers."""
        readers, name = list(value.uses()), value.name
        q, dq = self._signed_pair(value, f"{name}.signed", scale)
        self._graph.insert_after(value.producer(), [q, dq])
        for use in readers:
            use.node.replace_input_with(use.idx, dq.outputs[0])
        self._signed[dq.outputs[0].name] = scale
        if value.is_graph_output():
            self._graph.outputs[self._index_of_output(name)] = q.outputs[0]
            value.name, q.outputs[0].name = f"{name}.wide", name

    def _index_of_output(self, name: str) -> int:
        return next(i for i, output in enumerate(self._graph.outputs) if output.name == name)

    def _norm_bias(self, node: Any, array: Array, name: str) -> Any:
        """int32, on the grid of input times weight."""
        ir, weight, x = self._ir, self._source(node.inputs[1]), self._source(node.inputs[0])
        scale = np.float32(self._grids[weight][0] * self._grids[x][0])
        stored = self._register(np.rint(array / scale).astype(np.int32), name)
        dq = ir.Node("", "DequantizeLinear", [stored, self._register(np.array(scale), f"{name}.scale")], num_outputs=1)
        self._graph.insert_before(node, dq)
        return dq.outputs[0]

    def _quantized_constant(self, node: Any, index: int, value: Any) -> Any:
        ir, array = self._ir, np.asarray(value.const_value.numpy())
        name = f"{value.name}.fixed"
        if node.op_type == "LayerNormalization" and index == 2 and not self._wide:
            return self._norm_bias(node, array, name)
        if name not in self._graph.initializers:
            bits = self._bits
            if node.op_type in NORMS:
                bits = 16 if self._wide else 8
            found = grid(float(array.min()), float(array.max()), bits)
            stored = np.clip(np.rint(array / found[0]) + found[1], 0, LEVELS[bits]).astype(f"uint{bits}")
            params = self._parameters(name, found, bits)
            self._grids[name] = found
            self._register(stored, name)
            dq = ir.Node("", "DequantizeLinear", [self._graph.initializers[name], *params], num_outputs=1)
            dq.outputs[0].name = f"{name}.dq"
            dq.outputs[0].type, dq.outputs[0].shape = value.type, value.shape
            self._graph.insert_before(node, dq)
            return dq.outputs[0]
        return next(use.node.outputs[0] for use in self._graph.initializers[name].uses())

    def _parameters(self, name: str, found: tuple[float, int], bits: int) -> list[Any]:
        return [
            self._register(np.array(found[0], np.float32), f"{name}.scale"),
            self._register(np.array(found[1], f"uint{bits}"), f"{name}.zero"),
        ]

    def _register(self, array: Array, name: str) -> Any:
        return constant(self._ir, self._graph, array, name)
