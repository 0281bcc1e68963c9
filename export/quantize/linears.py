"""The linears of a portable graph: which weights can be quantized, and the graph when they are.

A linear is MatMul(x, Transpose(W)) with W [out, in], or MatMul(x, W) with W [in, out]. Quantized, it becomes in either
case

    MatMul(x, Transpose(DequantizeLinear(W, W.scale, W.zero_point)))    W [out, in]: the inputs of an output, which have
                                                                        scales in common, lie together in the file
    MatMul(x, DequantizeLinear(W, W.scale))                             W int8[in, out], float32[out]: one scale per
                                                                        output, as integer products take it

`W.scale` is float32[out, groups], `W.zero_point` [out, groups] in the type of W; int8 has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lensc.backends.errors import GraphError

from .weights import WeightFormat

TURNED = frozenset({"resampler.proj"})
"""The parameters of the model that are stored [inputs, outputs]."""

SCALE, ZERO_POINT = ".scale", ".zero_point"

UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""The types of unsigned values, by the bits that one takes."""

UINT2_OPSET, UINT2_IR = 25, 12
"""ONNX has UINT2 from here on; graphs without it stay at `lensc.export.onnx.OPSET`, which more engines read."""


@dataclass(frozen=True)
class Linear:
    """A weight [outputs, inputs]; `transposed` if the parameter is stored [inputs, outputs]; `reads` is the value that its
    product takes (of the first, if there are several).
    """

    name: str
    outputs: int
    inputs: int
    transposed: bool
    reads: str = ""


def find_linears(model: ir.Model, parameters: Mapping[str, object]) -> dict[str, Linear]:
    """The linears of `model` by the name of their weight, in the order of the graph."""
    found: dict[str, Linear] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        x, weight = node.inputs
        assert x is not None and weight is not None
        producer = weight.producer()
        transposed = producer is None
        if producer is not None and producer.op_type == "Transpose":
            weight = producer.inputs[0]
        if weight is None or weight.name is None or weight.name not in parameters or weight.shape is None:
            continue
        if not weight.is_initializer() or len(weight.shape) != 2:
            continue
        first, second = (int(d) for d in weight.shape.numpy())
        outputs, inputs = (second, first) if transposed else (first, second)
        found.setdefault(weight.name, Linear(weight.name, outputs, inputs, transposed, str(x.name)))
    return found


def quantize_linears(model: ir.Model, linears: Mapping[str, Linear], formats: Mapping[str, WeightFormat]) -> None:
    """Rewrite the linears named in `formats` in place. The new initializers have types and shapes, and no values.

    Raises GraphError for rows that do not end with whole bytes.
    """
    graph = model.graph
    for name, format in formats.items():
        linear = linears[name]
        weight = graph.initializers[name]
        readers = [use.node for use in weight.uses()]
        dtype = ir.DataType.INT8 if format.is_signed else UNSIGNED[format.container_bits]
        if linear.inputs * format.container_bits % 8:
            raise GraphError(
                f"weight {name}: rows of {linear.inputs} values in {format} do not end with whole bytes; use w8"
            )
        groups = format.groups(linear.inputs)
        turned = format.is_turned(linear.inputs)
        shape = (linear.inputs, linear.outputs) if turned else (linear.outputs, linear.inputs)
        values = _initializer(name, dtype, shape)
        per_row = groups == 1
        scale_shape = (linear.outputs,) if per_row else (linear.outputs, groups)
        scale = _initializer(name + SCALE, ir.DataType.FLOAT, scale_shape)
        inputs = [values, scale]
        if not format.is_signed:
            inputs.append(_initializer(name + ZERO_POINT, dtype, scale_shape))
        attributes = [ir.AttrInt64("axis", 0 if per_row and not turned else 1)]
        if not per_row:
            attributes.append(ir.AttrInt64("block_size", format.group_of(linear.inputs)))
        dequantize = ir.Node("", "DequantizeLinear", inputs, attributes, num_outputs=1, name=f"{name}/dequantize")
        dequantize.outputs[0].type, dequantize.outputs[0].shape = weight.type, ir.Shape(shape)
        graph.insert_before(readers[0], dequantize)
        if turned and not linear.transposed:
            for reader in readers:
                reader.outputs[0].replace_all_uses_with(dequantize.outputs[0])
                graph.remove(reader, safe=True)
        elif linear.transposed and not turned:
            turn = ir.Node(
                "", "Transpose", [dequantize.outputs[0]], [ir.AttrInt64s("perm", (1, 0))], name=f"{name}/transpose"
            )
            turn.outputs[0].type, turn.outputs[0].shape = weight.type, weight.shape
            graph.insert_after(dequantize, turn)
            weight.replace_all_uses_with(turn.outputs[0])
        else:
            weight.replace_all_uses_with(dequantize.outputs[0])
        del graph.initializers[name]
        for value in inputs:
            graph.register_initializer(value)
        if dtype == ir.DataType.UINT2:
            model.opset_imports[""] = UINT2_OPSET
            model.ir_version = UINT2_IR


def _initializer(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(
        name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=_Absent(name, dtype, shape)
    )


class _Absent(ir.LazyTensor):
    """A tensor whose bytes are written elsewhere."""

    def __init__(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
        super().__init__(self._refuse, dtype=dtype, shape=ir.Shape(shape), name=name)

    def _refuse(self) -> ir.TensorProtocol:
        raise ValueError(f"weight {self.name} has no value yet")
