"""Portable vision graph -> the float graph of fixed shapes that an NPU is given.

Everything data-dependent stays on the host, so what is left to do is small: every dimension gets a number, attention
becomes plain operators of rank 4 at most, what no input reaches is computed now, and weights lie as products take them,
[inputs, outputs]. Quantized weights stay DequantizeLinear in front of their MatMul.

A call of fewer patches is padded; padding is hidden as the graph's own biases hide it. The compiled size is the largest a
slice of a picture of sides up to 10:1 needs (`patches_of`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme

from .base import Array
from .errors import ExecutionError, GraphError

HIDDEN = -100.0
"""Added to the logit of a key that must not be seen. exp(-100) is 0 beside any key that is seen, and a range of 100 in 16
bits resolves 0.0015, where the portable graph's -10000 would take the resolution from all logits."""

BIASES = ("attention_bias", "key_bias")
"""Inputs that say which keys are seen: 0 or less."""

ASPECT = 10
"""Longer side over shorter side of a slice that must fit."""

STEP = 32
"""Patches are a multiple of it: the HTP's vectors take 64 bytes."""


def patches_of(spec: GraphSpec) -> int:
    """The patches to compile for.

    A slice has an area of `opt` patches at most and sides rounded to whole patches, which adds up to half a patch to each:
    (a + 1/2) * (b + 1/2) with a * b = opt and a / b = ASPECT. 1088 for 448 x 448 pixels.
    """
    size = spec.dims["patches"]
    sides = math.sqrt(size.opt) * (math.sqrt(ASPECT) + 1 / math.sqrt(ASPECT))
    needed = size.opt + sides / 2 + 0.25
    return min(size.max, math.ceil(needed / STEP) * STEP)


def shape_at(shape: tuple[int | str, ...], patches: int) -> tuple[int, ...]:
    """`shape` with one slice of so many patches."""
    sizes = {"slices": 1, "patches": patches}
    return tuple(d if isinstance(d, int) else sizes[d] for d in shape)


def cannot_be_lowered(spec: GraphSpec) -> str | None:
    """Why the graph is not one that can be made of fixed shapes here, or None."""
    if spec.states:
        return "its KV cache grows with every token, an NPU takes fixed shapes"
    names = {t.name for t in spec.inputs}
    if set(spec.dims) != {"slices", "patches"} or not set(BIASES) <= names:
        return f"expected dimensions slices and patches and inputs {', '.join(BIASES)}"
    return None


def lower(graph: Graph, patches: int) -> Any:
    """The `onnx_ir.Model` of `graph` for one slice of `patches`. Weights are read when they are asked for.

    Raises ExecutionError for a file that is not ONNX, GraphError for what has no lowering.
    """
    import onnx_ir as ir

    try:
        model = ir.load(graph.path)
    except Exception as error:  # protobuf's own, and whatever a damaged file makes of the reader
        problem = " ".join(str(error).split())
        raise ExecutionError(f"{graph.path}: cannot be read as ONNX: {problem}; export it again") from error
    for values, tensors in ((model.graph.inputs, graph.spec.inputs), (model.graph.outputs, graph.spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(shape_at(tensor.shape, patches))
    return _Lowering(ir, model, graph.spec, Scheme.parse(graph.scheme)).done()


class _Lowering:
    """Rewrites a model in place: attention, then what no input reaches, then the operands of products."""

    def __init__(self, ir: Any, model: Any, spec: GraphSpec, scheme: Scheme) -> None:
        self._ir, self._model, self._graph, self._spec, self._scheme = ir, model, model.graph, spec, scheme

    def done(self) -> Any:
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        for node in list(self._graph):
            if node.domain == "lensc":
                if node.op_type != "Attention":
                    raise GraphError(f"graph {self._spec.name}: no lowering of lensc.{node.op_type} for an NPU")
                self._attention(node)
        self._model.functions.clear()
        for node in list(self._graph):
            if all(_is_constant(value) for value in node.inputs if value is not None):
                self._fold(node)
        for node in list(self._graph):
            if node.op_type == "MatMul" and node.inputs[0].is_initializer():
                self._swap(node)
        if not self._scheme.weights_are_float:
            for node in list(self._graph):
                if node.op_type == "MatMul" and node.inputs[1].is_initializer():
                    self._quantize_weight(node)
        RemoveUnusedNodesPass()(self._model)
        self._model.opset_imports.pop("lensc", None)
        return self._model

    def _attention(self, call: Any) -> None:
        """softmax(q * scale @ k^T + bias) @ v, heads in front. Raises GraphError for widths that heads do not divide."""
        ir = self._ir
        query, key, value, bias = call.inputs
        heads, scale = call.attributes["num_heads"].as_int(), call.attributes["scale"].as_float()
        name = call.outputs[0].name
        made: list[Any] = []

        def node(kind: str, inputs: list[Any], part: str, **attributes: Any) -> Any:
            attrs = [ir.AttrInt64s(k, v) if isinstance(v, list) else ir.AttrInt64(k, v) for k, v in attributes.items()]
            new = ir.Node("", kind, inputs, attrs, num_outputs=1)
            new.outputs[0].name = f"{name}.{part}"
            made.append(new)
            return new.outputs[0]

        split = self._constant(np.array([0, 0, heads, -1], np.int64), "split_heads", heads)
        query_4 = node("Reshape", [query, split], "query_4")
        key_4 = node("Reshape", [key, split], "key_4")
        value_4 = node("Reshape", [value, split], "value_4")
        query_h = node("Transpose", [query_4], "query_h", perm=[0, 2, 1, 3])
        key_h = node("Transpose", [key_4], "key_h", perm=[0, 2, 3, 1])
        value_h = node("Transpose", [value_4], "value_h", perm=[0, 2, 1, 3])
        scaled = node("Mul", [query_h, self._constant(np.array([scale], np.float32), "scale", scale)], "scaled")
        scores = node("MatMul", [scaled, key_h], "scores")
        axes = self._constant(np.array([1, 2], np.int64), "axes", "1_2")
        bias_4 = node("Unsqueeze", [bias, axes], "bias_4")
        masked = node("Add", [scores, bias_4], "masked")
        weights = node("Softmax", [masked], "weights", axis=-1)
        mixed_h = node("MatMul", [weights, value_h], "mixed_h")
        mixed_4 = node("Transpose", [mixed_h], "mixed_4", perm=[0, 2, 1, 3])
        joined = self._constant(np.array([0, 0, -1], np.int64), "join_heads", "")
        mixed = node("Reshape", [mixed_4, joined], "mixed")
        self._graph.insert_before(call, made)
        call.outputs[0].replace_all_uses_with(mixed)
        self._graph.remove(call, safe=True)
        mixed.name = name

    # --- constants ------------------------------------------------------------------------------------------------

    def _fold(self, node: Any) -> None:
        """Compute a node that no input reaches, unless it is the weight that a product reads quantized."""
        if node.op_type == "DequantizeLinear":
            readers = {use.node.op_type for use in node.outputs[0].uses()}
            if readers <= {"MatMul", "Transpose"}:
                return
        if node.op_type == "Transpose" and node.inputs[0].producer() is not None:
            self._turn(node, node.inputs[0].producer())
            return
        self._replace(node, self._constant(_evaluated(self._ir, node), "folded", node.outputs[0].name))

    def _quantize_weight(self, node: Any) -> None:
        """A weight that the recipe left in float, in a graph of integers: int8 with a scale per output. Where activations
        have 16 bits, what that loses follows in an int8 weight of its own, and both products are added up.
        """
        ir, rest = self._ir, np.asarray(_array(node.inputs[1]), np.float64)
        name, x = node.outputs[0].name, node.inputs[0]
        products = []
        for part in ("high", "low") if self._scheme.activation_bits == 16 else ("high",):
            axes = (0,) if rest.ndim == 2 else tuple(range(rest.ndim))
            scale = np.maximum(np.abs(rest).max(axes), np.finfo(np.float32).tiny) / 127
            stored = np.rint(rest / scale)
            rest = rest - stored * scale
            values = self._constant(stored.astype(np.int8), part, node.inputs[1].name)
            scales = self._constant(scale.astype(np.float32), f"{part}.scale", node.inputs[1].name)
            axis = [ir.AttrInt64("axis", 1)] if scale.ndim else []
            weight = ir.Node("", "DequantizeLinear", [values, scales], axis, num_outputs=1)
            weight.outputs[0].name = f"{name}.{part}.weight"
            weight.outputs[0].type = node.inputs[1].type
            product = ir.Node("", "MatMul", [x, weight.outputs[0]], num_outputs=1)
            product.outputs[0].name, product.outputs[0].type = f"{name}.{part}", node.outputs[0].type
            self._graph.insert_before(node, [weight, product])
            products.append(product)
        last = products[0]
        if len(products) == 2:
            last = ir.Node("", "Add", [product.outputs[0] for product in products], num_outputs=1)
            last.outputs[0].type = node.outputs[0].type
            self._graph.insert_before(node, last)
        old = node.outputs[0]
        old.replace_all_uses_with(last.outputs[0])
        if old.is_graph_output():
            self._graph.outputs[list(self._graph.outputs).index(old)] = last.outputs[0]
        self._graph.remove(node, safe=True)
        last.outputs[0].name, last.outputs[0].shape = name, old.shape

    def _swap(self, node: Any) -> None:
        """C @ x = (x^T @ C^T)^T: the HTP takes a constant as the second operand only."""
        ir = self._ir
        constant, x = node.inputs
        rank = len(constant.shape)
        last = [*range(rank - 2), rank - 1, rank - 2]
        name = node.outputs[0].name
        turned = ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", last)], num_outputs=1)
        turned.outputs[0].name = f"{name}.turned_key"
        other = self._constant(np.ascontiguousarray(np.swapaxes(_array(constant), -1, -2)), "turned", constant.name)
        product = ir.Node("", "MatMul", [turned.outputs[0], other], num_outputs=1)
        product.outputs[0].name = f"{name}.turned"
        back = ir.Node("", "Transpose", [product.outputs[0]], [ir.AttrInt64s("perm", last)], num_outputs=1)
        self._graph.insert_before(node, [turned, product, back])
        node.outputs[0].replace_all_uses_with(back.outputs[0])
        self._graph.remove(node, safe=True)
        back.outputs[0].name = name

    def _turn(self, transpose: Any, dequantize: Any) -> None:
        """Transpose(DequantizeLinear(w)), w of [outputs, inputs] -> DequantizeLinear of [inputs, outputs].

        The HTP takes blocks of signed values without zero points; those around 8 are made that.
        """
        ir = self._ir
        values, scales, *zeros = dequantize.inputs
        middle = 0
        if values.const_value.dtype == ir.DataType.UINT4:
            middle = 8
            if not zeros or (_array(zeros[0]).astype(np.int8) != middle).any():
                raise GraphError(
                    f"{values.name}: weights of 4 bits with zero points have no form on an NPU; use w4a16-g16"
                )
        attributes = {name: a.as_int() for name, a in dequantize.attributes.items()}
        signed = np.ascontiguousarray((_array(values).astype(np.int8) - middle).T)
        bits = (
            ir.DataType.INT8 if values.const_value.dtype in (ir.DataType.INT8, ir.DataType.UINT8) else ir.DataType.INT4
        )
        turned = [
            self._constant(signed, "turned", values.name, bits),
            self._constant(np.ascontiguousarray(_array(scales).T), "turned", scales.name),
        ]
        attributes["axis"] = 1 - attributes.get("axis", 1)
        new = ir.Node(
            "", "DequantizeLinear", turned, [ir.AttrInt64(k, v) for k, v in attributes.items()], num_outputs=1
        )
        new.outputs[0].name = f"{values.name}.float"
        new.outputs[0].type = transpose.outputs[0].type
        self._graph.insert_before(transpose, new)
        transpose.outputs[0].replace_all_uses_with(new.outputs[0])
        self._graph.remove([transpose], safe=True)
        if not dequantize.outputs[0].uses():
            self._graph.remove([dequantize], safe=True)

    def _constant(self, array: Array, kind: str, what: object, dtype: Any = None) -> Any:
        """An initializer; the same one for the same name."""
        return constant(self._ir, self._graph, array, f"{what}.{kind}" if what != "" else kind, dtype)

    def _replace(self, node: Any, value: Any) -> None:
        node.outputs[0].replace_all_uses_with(value)
        self._graph.remove(node, safe=True)


def constant(ir: Any, graph: Any, array: Array, name: str, dtype: Any = None) -> Any:
    """The initializer `name` of `graph`, made of `array` if there is none."""
    if name not in graph.initializers:
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _array(value: Any) -> Array:
    return np.asarray(value.const_value.numpy())


def _is_constant(value: Any) -> bool:
    """Whether no input reaches `value`."""
    if value.is_initializer():
        return True
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type == "DequantizeLinear"
        and all(v.is_initializer() for v in producer.inputs)
    )


def _evaluated(ir: Any, node: Any) -> Array:
    """What a node of constants gives."""
    from onnx.reference import ReferenceEvaluator

    inputs = [_array(v) if v.is_initializer() else _evaluated(ir, v.producer()) for v in node.inputs]
    names = [f"x{i}" for i in range(len(inputs))]
    proto = ir.serde.serialize_node(node)
    proto.ClearField("input")
    proto.input.extend(names)
    results: Any = ReferenceEvaluator(proto).run(None, dict(zip(names, inputs, strict=True)))
    return np.asarray(results[0])
