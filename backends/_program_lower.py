"""Portable graph -> the steps of a program.

    lensc.RMSNorm, LayerNormalization          Normalize
    MatMul with a weight, quantized or not     Linear, which takes the Add of a bias and of a residual stream behind it
    lensc.CausalAttention, lensc.Attention     the same
    x * Sigmoid(x) * y                         SiluMul
    Gelu, tanh                                 GeluTanh
    Gather                                     GatherRows of a table, SelectRows of the tokens

Shapes are followed from the inputs on: rows are products of the spec's dimensions. What depends on constants alone is
computed here, once: the resampler's queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from lensc.export.graph import GraphSpec
from lensc.kernels.linear.reference import dequantize, linear, unpack
from lensc.kernels.norm.reference import layer_norm, rms_norm

from ._multiples import scales_of
from ._program import (
    Add,
    Attention,
    CausalAttention,
    Constant,
    GatherRows,
    GeluTanh,
    Kind,
    Linear,
    Normalize,
    Port,
    Program,
    SelectRows,
    SiluMul,
    Step,
    Value,
    WeightRecord,
    product,
    sums_multiples,
)
from ._program_file import check, check_spec
from ._program_finish import fused, placed, renumbered
from ._program_operands import Const, Dims, Dynamic, GraphInput, Operand, Quantized, Sigmoid, Silu, shown
from ._program_weights import BITS, Blobs, Tensor, is_default, tensor_of
from .base import Array
from .errors import GraphError

DOMAIN = "lensc"

FOLDED = 1 << 20
"""Weights that are dequantized at once where a product of constants is computed: 8 MiB of float64."""

KINDS: dict[str, Kind] = {"FLOAT": "f32", "INT8": "int8", "UINT8": "uint8", "UINT4": "uint4", "UINT2": "uint2"}


def lower(model: Any, spec: GraphSpec, own: Path, activation_bits: int = 32) -> Program:
    """The program of an `onnx_ir.Model`. What cannot be read where it lies is written to the data file `own`.

    All other files of the program are the graph's own, which the caller puts beside `own`. With `activation_bits` 8 the
    inputs of quantized linears are rounded to 8 bits. The model is not changed. Raises GraphError for what has no step,
    StorageError.
    """
    lowering = _Lowering(model.graph, spec, activation_bits)
    for node in model.graph:
        lowering.node(node)
    program = placed(lowering.finished(), lowering.blobs, own)
    check(program, {name: _size(name, lowering.blobs, own) for name in program.files})
    check_spec(program, spec)
    return program


class _Lowering:
    """The steps of one graph, in the order of its nodes."""

    def __init__(self, graph: Any, spec: GraphSpec, activation_bits: int) -> None:
        self.blobs = Blobs()
        self._spec = spec
        self._int8_inputs = activation_bits == 8
        self._steps: list[Step] = []
        self._dims: list[Dims] = []
        self._inputs: dict[str, Dynamic] = {}
        self._node: Any = None
        self._layers = 0
        self._tensors: dict[str, Tensor] = {}
        self._operands: dict[str, Operand] = {
            t.name: GraphInput(t.name, t.dtype, t.shape)
            for t in spec.inputs
            if any(v.name == t.name for v in graph.inputs)
        }
        self._initializers = graph.initializers
        self._handlers: dict[tuple[str, str], Callable[[], None]] = {
            (DOMAIN, "RMSNorm"): lambda: self._normalize("rms"),
            (DOMAIN, "CausalAttention"): self._causal_attention,
            (DOMAIN, "Attention"): self._attention,
            ("", "LayerNormalization"): lambda: self._normalize("layer"),
            ("", "MatMul"): self._matmul,
            ("", "Add"): self._add,
            ("", "Mul"): self._mul,
            ("", "Sigmoid"): lambda: self._is(Sigmoid(self._dynamic(0))),
            ("", "Gelu"): self._gelu,
            ("", "Gather"): self._gather,
            ("", "DequantizeLinear"): self._dequantize,
            ("", "Transpose"): self._transpose,
            ("", "Reshape"): self._reshape,
            ("", "Unsqueeze"): self._unsqueeze,
            ("", "Identity"): lambda: self._is(self._operand(0)),
        }

    def node(self, node: Any) -> None:
        """Take the next node of the graph. Raises GraphError."""
        self._node = node
        handler = self._handlers.get((node.domain, node.op_type))
        if handler is None:
            known = ", ".join(sorted(f"{domain}.{name}".lstrip(".") for domain, name in self._handlers))
            self._refuse(f"expected one of {known}")
        handler()

    def finished(self) -> Program:
        """The program with the constants' places still to be settled. Raises GraphError."""
        outputs = []
        states = {state.output for state in self._spec.states}
        for tensor in self._spec.outputs:
            if tensor.name in states:
                continue
            made = self._operands.get(tensor.name)
            if not isinstance(made, Dynamic) or made.dims != tensor.shape:
                raise GraphError(f"graph {self._spec.name}: expected to make {tensor}, found {shown(made)}")
            outputs.append(Port(tensor.name, made.id))
        steps = fused(self._steps, [port.value for port in outputs])
        inputs = [self._inputs[t.name].id for t in self._spec.inputs if t.name in self._inputs]
        order = {old: new for new, old in enumerate([*inputs, *(step.y for step in steps)])}
        values = tuple(Value(product(self._dims[old][:-1]), int(self._dims[old][-1])) for old in order)
        names = [t.name for t in self._spec.inputs if t.name in self._inputs]
        return Program(
            self._spec.name,
            (),
            values,
            tuple(Port(name, i) for i, name in enumerate(names)),
            tuple(renumbered(step, order) for step in steps),
            tuple(Port(port.name, order[port.value]) for port in outputs),
        )

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _normalize(self, kind: Literal["rms", "layer"]) -> None:
        x, epsilon = self._operand(0), self._float("epsilon", 1e-5)
        weight, bias = self._vector(1), self._vector(2) if len(self._node.inputs) > 2 and self._node.inputs[2] else None
        if kind == "layer" and self._int("axis", -1) not in (-1, len(self._dims_of(x)) - 1):
            self._refuse("expected the last axis")
        for part in (weight, bias):
            if part is not None and part.shape[-1] != self._dims_of(x)[-1]:
                self._refuse(f"{part.name} has {part.shape[-1]} values, expected {self._dims_of(x)[-1]}")
        if isinstance(x, Const):
            shift = None if bias is None else bias.array()
            rows = self._array(x).reshape(-1, x.dims[-1])
            made = rms_norm(rows, weight.array(), epsilon)
            if kind == "layer":
                made = layer_norm(rows, weight.array(), shift, epsilon)
            self._is(self._held(made, x.dims))
            return
        value = self._value(x)
        constants = (self._constant(weight), None if bias is None else self._constant(bias))
        self._makes(value.dims, lambda y: Normalize(kind, value.id, *constants, epsilon, y))

    def _matmul(self) -> None:
        x, weight = self._operand(0), self._operand(1)
        if not isinstance(weight, Const | Quantized) or len(weight.dims) != 2:
            self._refuse(f"its second input is {shown(weight)}, expected a constant matrix")
        inputs, outputs = weight.dims
        if self._dims_of(x)[-1] != inputs:
            self._refuse(f"its first input is {shown(x)}, expected rows of {inputs}")
        record = self._weight(weight, outputs, inputs)
        if isinstance(x, Const):
            made = self._product(self._array(x).reshape(-1, inputs), record)
            self._is(self._held(made, (*x.dims[:-1], outputs)))
            return
        value = self._value(x)
        self._makes((*value.dims[:-1], outputs), lambda y: Linear(value.id, record, None, None, y))

    def _add(self) -> None:
        a, b = self._operand(0), self._operand(1)
        if isinstance(a, Const) and isinstance(b, Const):
            made = self._array(a) + self._array(b)
            self._is(self._held(made, made.shape))
            return
        if isinstance(a, Const):
            a, b = b, a
        value = self._value(a)
        if not isinstance(b, Const):
            other = self._value(b)
            if other.dims != value.dims:
                self._refuse(f"adds {shown(value)} and {shown(other)}, expected the same shape")
            self._makes(value.dims, lambda y: Add(value.id, other.id, y))
            return
        dims = b.dims
        while len(dims) > 1 and dims[0] == 1:
            dims = dims[1:]
        if b.turned or dims != value.dims[len(value.dims) - len(dims) :]:
            self._refuse(f"adds {shown(b)} to {shown(value)}, which it does not repeat over")
        constant = self._constant(b.tensor)
        self._makes(value.dims, lambda y: Add(value.id, constant, y))

    def _mul(self) -> None:
        a, b = self._operand(0), self._operand(1)
        if isinstance(a, Sigmoid | Silu):
            a, b = b, a
        if isinstance(b, Sigmoid) and a == b.of:
            self._is(Silu(b.of))
        elif isinstance(b, Silu) and isinstance(a, Dynamic) and a.dims == b.of.dims:
            up, gate = a, b.of
            self._makes(gate.dims, lambda y: SiluMul(gate.id, up.id, y))
        else:
            self._refuse(f"multiplies {shown(a)} and {shown(b)}, expected x * Sigmoid(x) * y")

    def _gelu(self) -> None:
        if self._string("approximate", "none") != "tanh":
            self._refuse("expected approximate='tanh'")
        x = self._dynamic(0)
        self._makes(x.dims, lambda y: GeluTanh(x.id, y))

    def _gather(self) -> None:
        source, indices, axis = self._operand(0), self._operand(1), self._int("axis", 0)
        if not isinstance(indices, GraphInput) or indices.dtype != "int64":
            self._refuse(f"its indices are {shown(indices)}, expected an input of int64")
        if isinstance(source, Const) and axis == 0 and len(source.dims) == 2 and not source.turned:
            table = self._constant(source.tensor)
            self._makes((*indices.dims, table.width), lambda y: GatherRows(table, indices.name, y))
            return
        x = self._dynamic(0)
        if axis != 1 or len(x.dims) != 3 or len(indices.dims) != 1:
            self._refuse(f"takes from {shown(x)} along axis {axis}, expected tokens of [batch, tokens, width]")
        dims = (x.dims[0], *indices.dims, x.dims[2])
        self._makes(dims, lambda y: SelectRows(x.id, indices.name, y))

    def _causal_attention(self) -> None:
        q, k, v = (self._dynamic(i) for i in range(3))
        positions, past = self._operand(3), (self._operand(5), self._operand(6))
        if not isinstance(positions, GraphInput) or len(q.dims) != 3 or positions.dims != q.dims[1:2]:
            self._refuse(f"positions are {shown(positions)}, expected an input [tokens]")
        layer, self._layers = self._layers, self._layers + 1
        states = self._spec.states[2 * layer : 2 * layer + 2]
        found = [
            (p.name if isinstance(p, GraphInput) else "", o.name)
            for p, o in zip(past, self._node.outputs[1:], strict=True)
        ]
        if found != [(state.input, state.output) for state in states]:
            self._refuse(f"has the states {found}, expected those of layer {layer}")
        heads, kv_heads, dim = (self._int(name) for name in ("num_heads", "kv_num_heads", "head_dim"))
        scale, table = self._float("scale"), self._constant(self._vector(4))
        self._makes(
            q.dims, lambda y: CausalAttention(q.id, k.id, v.id, y, layer, heads, kv_heads, dim, scale, table)
        )  # fmt: skip

    def _attention(self) -> None:
        q, k, v, bias = self._operand(0), self._dynamic(1), self._dynamic(2), self._operand(3)
        if len(k.dims) != 3 or len(self._dims_of(q)) != 3 or v.dims != k.dims:
            self._refuse(f"has {shown(q)}, {shown(k)} and {shown(v)}, expected [slices, rows, width] of one width")
        if not isinstance(bias, GraphInput) or bias.dtype != "float32" or bias.dims != k.dims[:2]:
            self._refuse(f"its bias is {shown(bias)}, expected an input float32[{product(k.dims[:2])}]")
        heads, scale = self._int("num_heads"), self._float("scale")
        if isinstance(q, Const) and q.dims[0] == 1 and not q.turned:
            query: int | Constant = self._constant(q.tensor)
        elif (value := self._value(q)).dims[0] == k.dims[0]:
            query = value.id
        else:
            self._refuse(f"its queries are {shown(q)}, expected as many as {k.dims[0]}")
        dims = (k.dims[0], *self._dims_of(q)[1:])
        self._makes(dims, lambda y: Attention(query, k.id, v.id, bias.name, y, heads, scale))

    def _dequantize(self) -> None:
        values, scale, *rest = (self._const(i) for i in range(len([v for v in self._node.inputs if v is not None])))
        if any(part.turned for part in (values, scale, *rest)) or len(values.dims) != 2:
            self._refuse(f"dequantizes {shown(values)}, expected a matrix")
        axis, zero = self._int("axis", 1) % 2, rest[0].tensor if rest else None
        group = self._int("block_size", 0)
        self._is(Quantized(values.tensor, scale.tensor, zero, axis, group))

    def _transpose(self) -> None:
        x = self._operand(0)
        if not isinstance(x, Const | Quantized) or len(x.dims) != 2:
            self._refuse(f"turns {shown(x)}, expected a constant matrix")
        self._is(replace(x, turned=not x.turned))

    def _reshape(self) -> None:
        x, wanted = self._operand(0), [int(d) for d in self._const(1).tensor.array()]
        if isinstance(x, GraphInput) and len(x.dims) == 1 and wanted == [-1]:
            self._is(x)
            return
        if not isinstance(x, Const) or x.turned:
            self._refuse(f"reshapes {shown(x)}, expected a constant, or an input of one dimension to [-1]")
        known = prod(d for d in wanted if d != -1)
        dims = tuple(prod(x.dims) // max(known, 1) if d == -1 else d for d in wanted)
        if prod(dims) != prod(x.dims) or 0 in dims:
            self._refuse(f"reshapes {shown(x)} to {wanted}")
        self._is(Const(self._reshaped(x.tensor, dims)))

    def _unsqueeze(self) -> None:
        x, axes = self._const(0), [int(d) for d in self._const(1).tensor.array()]
        if x.turned or axes != [0]:
            self._refuse(f"expands {shown(x)} along {axes}, expected a constant along [0]")
        self._is(Const(self._reshaped(x.tensor, (1, *x.dims))))

    # --- operands -------------------------------------------------------------------------------------------------

    def _operand(self, i: int) -> Operand:
        """The node's input `i`. Raises GraphError if there is none."""
        value = self._node.inputs[i] if i < len(self._node.inputs) else None
        if value is None or value.name is None:
            self._refuse(f"has no input {i}")
        if value.name not in self._operands:
            known = self._initializers.get(value.name)
            if known is None or known.const_value is None:
                self._refuse(f"input {value.name!r} is not made by a node before it")
            self._operands[value.name] = Const(tensor_of(value.name, known.const_value))
        return self._operands[value.name]

    def _dynamic(self, i: int) -> Dynamic:
        return self._value(self._operand(i))

    def _value(self, operand: Operand) -> Dynamic:
        """A value of the program, which an input of floats becomes."""
        if isinstance(operand, GraphInput) and operand.dtype == "float32" and len(operand.dims) > 1:
            if operand.name not in self._inputs and isinstance(operand.dims[-1], int):
                self._inputs[operand.name] = self._new(operand.dims)
            if operand.name in self._inputs:
                return self._inputs[operand.name]
        if not isinstance(operand, Dynamic):
            self._refuse(f"reads {shown(operand)}, expected floats that depend on the inputs")
        return operand

    def _const(self, i: int) -> Const:
        operand = self._operand(i)
        if not isinstance(operand, Const):
            self._refuse(f"input {i} is {shown(operand)}, expected a constant")
        return operand

    def _vector(self, i: int) -> Tensor:
        """The node's input `i`, a constant of one dimension."""
        constant = self._const(i)
        if len(constant.dims) != 1 or constant.tensor.type != "FLOAT":
            self._refuse(f"input {i} is {shown(constant)}, expected a vector of floats")
        return constant.tensor

    def _dims_of(self, operand: Operand) -> Dims:
        return operand.of.dims if isinstance(operand, Sigmoid | Silu) else operand.dims

    def _array(self, constant: Const) -> Array:
        if constant.tensor.type != "FLOAT":
            self._refuse(f"computes with {shown(constant)}, expected floats")
        lies = constant.tensor.array().reshape(constant.tensor.shape)
        return lies.T if constant.turned else lies

    def _held(self, made: Array, dims: Sequence[int]) -> Const:
        """What was computed of constants, in float32."""
        name = str(self._node.outputs[0].name)
        return Const(Tensor(name, "FLOAT", tuple(dims), held=np.ascontiguousarray(made, "<f4").tobytes()))

    def _reshaped(self, tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The same object for the same bytes in the same shape."""
        key = f"{tensor.name} {dims}"
        return self._tensors.setdefault(key, tensor.reshaped(dims))

    def _constant(self, tensor: Tensor) -> Constant:
        if tensor.type != "FLOAT" or not tensor.shape or 0 in tensor.shape:
            self._refuse(f"constant {tensor.name} is {tensor.type}{list(tensor.shape)}, expected floats")
        return Constant(tensor.name, prod(tensor.shape[:-1]), tensor.shape[-1], self.blobs.add(tensor))

    # --- weights --------------------------------------------------------------------------------------------------

    def _weight(self, found: Const | Quantized, outputs: int, inputs: int) -> WeightRecord:
        """The record of a weight that the graph multiplies with as [inputs, outputs]."""
        values = found.tensor if isinstance(found, Const) else found.values
        kind = KINDS.get(values.type)
        if kind is None or (isinstance(found, Const)) != (kind == "f32"):
            self._refuse(f"weight {values.name} is {values.type}, expected floats or quantized integers")
        if not found.turned and BITS[values.type] < 8:
            self._refuse(f"weight {values.name} lies [inputs, outputs] in {values.type}, expected [outputs, inputs]")
        if inputs * BITS[values.type] % 8:
            self._refuse(f"weight {values.name}: rows of {inputs} {values.type} do not end with whole bytes")
        place = self.blobs.add(values, turned=not found.turned)
        if isinstance(found, Const):
            return WeightRecord(values.name, kind, outputs, inputs, 0, place, None, None, "float")
        along = 1 if found.turned else 0
        if found.axis != (along if found.group else 1 - along) or (found.group and not found.turned):
            self._refuse(
                f"weight {values.name}: scales along axis {found.axis}, expected groups of inputs or one an output"
            )
        group = 0 if found.group >= inputs else found.group
        groups = -(-inputs // group) if group else 1
        parts = [("scale", found.scale, "FLOAT"), ("zero_point", found.zero_point, values.type)]
        for name, part, type_ in parts:
            shapes = [(outputs, groups), (outputs,)] if groups == 1 else [(outputs, groups)]
            if part is not None and (part.shape not in shapes or part.type != type_):
                self._refuse(
                    f"weight {values.name}: {name} is {part.type}{list(part.shape)}, expected {[outputs, groups]}"
                )
        zero = found.zero_point
        if zero is not None and is_default(zero, kind):
            zero = None
        elif zero is None and kind != "int8":
            self._refuse(f"weight {values.name}: {kind} without zero points means 0, expected some")
        elif zero is not None and kind == "int8":
            self._refuse(f"weight {values.name}: int8 with zero points, expected none")
        products: Literal["float", "int8"] = "int8" if self._int8_inputs else "float"
        scale, multiples = self.blobs.add(found.scale), None
        bits, integers = BITS[values.type], self._int8_inputs and zero is None
        if integers and bits < 8 and sums_multiples(inputs, group, bits):
            scale, multiples = self.blobs.add_multiples(found.scale) or (scale, None)
        zero_place = None if zero is None else self.blobs.add(zero)
        return WeightRecord(values.name, kind, outputs, inputs, group, place, scale, zero_place, products, multiples)

    def _product(self, x: Array, weight: WeightRecord) -> Array:
        """x W^T of constants, some outputs at a time."""
        parts, start = [], 0
        step = max(1, FOLDED // weight.inputs)
        for piece in self.blobs.items[weight.values.offset].pieces():
            for first in range(0, len(piece), step):
                rows = piece[first : first + step]
                parts.append(linear(x, self._dequantized(rows, weight, start)))
                start += len(rows)
        return np.concatenate(parts, axis=1)

    def _dequantized(self, rows: Array, weight: WeightRecord, start: int) -> Array:
        """Some rows of a weight, from output `start` on, in float."""
        shape = (len(rows), weight.inputs)
        if weight.scale is None:
            return rows.view("<f4").reshape(shape)
        part = slice(start * weight.groups, (start + len(rows)) * weight.groups)
        if weight.multiples is None:
            scales = self.blobs.items[weight.scale.offset].tensor.array()[part].reshape(len(rows), -1)
        else:
            steps = self.blobs.items[weight.scale.offset].tensor.array()[start : start + len(rows)]
            whole = self.blobs.items[weight.multiples.offset].tensor.array()[part].reshape(len(rows), -1)
            scales = scales_of(steps, whole)
        if weight.kind == "int8":
            return dequantize(rows.view(np.int8).reshape(shape), scales, None, weight.group)
        bits = BITS[weight.kind.upper()]
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
        if weight.zero_point is not None:
            packed = self.blobs.items[weight.zero_point.offset].tensor.array()
            zeros = unpack(packed, bits, weight.outputs * weight.groups)[part].reshape(scales.shape)
        return dequantize(unpack(rows, bits, prod(shape)).reshape(shape), scales, zeros, weight.group)

    # --- making ---------------------------------------------------------------------------------------------------

    def _is(self, operand: Operand) -> None:
        """Let the node's output stand for `operand`."""
        self._operands[str(self._node.outputs[0].name)] = operand

    def _new(self, dims: Dims) -> Dynamic:
        self._dims.append(dims)
        return Dynamic(len(self._dims) - 1, dims)

    def _makes(self, dims: Dims, step: Callable[[int], Step]) -> None:
        """Let the node's output be the value of a step."""
        made = self._new(dims)
        self._steps.append(step(made.id))
        self._is(made)

    def _int(self, name: str, default: int | None = None) -> int:
        return int(self._attribute(name, default))

    def _float(self, name: str, default: float | None = None) -> float:
        return float(self._attribute(name, default))

    def _string(self, name: str, default: str) -> str:
        return str(self._attribute(name, default))

    def _attribute(self, name: str, default: Any) -> Any:
        found = self._node.attributes.get(name)
        if found is None and default is None:
            self._refuse(f"has no attribute {name}")
        return default if found is None else found.value

    def _refuse(self, reason: str) -> NoReturn:
        node = self._node
        kind = f"{node.domain}.{node.op_type}".lstrip(".")
        raise GraphError(f"graph {self._spec.name}: node {kind} of {node.outputs[0].name!r} {reason}")


def _size(name: str, blobs: Blobs, own: Path) -> int:
    """Bytes of a file of the program."""
    files = [own, *(blob.tensor.file for blob in blobs.items if blob.tensor.file is not None)]
    return next(file.stat().st_size for file in files if file.name == name)
