"""Portable graph -> the float graph of fixed shapes that an NPU is given.

Everything data-dependent stays on the host, so what is left to do is small: every dimension gets a number (`_qnn_form`),
attention becomes plain operators (`_qnn_functions`), what no input reaches is computed now, and weights lie as products
take them, [inputs, outputs]. Quantized weights stay DequantizeLinear in front of their MatMul.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme

from ._portable import model_of
from ._qnn_form import BIASES, Form, decoder_inputs
from ._qnn_functions import LOWERINGS, OPSET, Nodes, constant, register
from .base import Array
from .errors import GraphError

REPLACED = ("position_ids", "logit_positions")
"""Inputs of a decoder that stay with the host, the second where there is one token."""


def cannot_be_lowered(spec: GraphSpec) -> str | None:
    """Why the graph is not one that can be made of fixed shapes here, or None."""
    names = {t.name for t in spec.inputs}
    if spec.states:
        dims, wanted = {"batch", "tokens", "rows", "past"}, {"inputs_embeds", *REPLACED}
    else:
        dims, wanted = {"slices", "patches"}, set(BIASES)
    if set(spec.dims) != dims or not wanted <= names:
        return f"expected dimensions {', '.join(sorted(dims))} and inputs {', '.join(sorted(wanted))}"
    return None


def lower(graph: Graph, form: Form) -> Any:
    """The `onnx_ir.Model` of `graph` in the sizes of `form`. Weights are read when they are asked for.

    Raises ExecutionError for a file that is not ONNX, GraphError for what has no lowering.
    """
    import onnx_ir as ir

    model = model_of(graph.path)
    for values, tensors in ((model.graph.inputs, graph.spec.inputs), (model.graph.outputs, graph.spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(form.shape(tensor))
    return _Lowering(ir, model, graph.spec, Scheme.parse(graph.scheme), form).done()


def rotary_of(graph: Graph) -> tuple[int, Array]:
    """Of a decoder: how many heads share keys, and float32[head_dim / 2], by what each position turns them."""
    for node in model_of(graph.path).graph:
        if node.op_type == "CausalAttention":
            return node.attributes["groups"].as_int(), _array(node.inputs[4])
    raise GraphError(f"graph {graph.spec.name}: no lensc.CausalAttention")


class _Lowering:
    """Rewrites a model in place: its functions, then what no input reaches, then the operands of products."""

    def __init__(self, ir: Any, model: Any, spec: GraphSpec, scheme: Scheme, form: Form) -> None:
        self._ir, self._model, self._graph, self._spec, self._scheme = ir, model, model.graph, spec, scheme
        self._form = form

    def done(self) -> Any:
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        if self._spec.states:
            self._add_inputs()
        inputs = {value.name: value for value in self._graph.inputs}
        for node in list(self._graph):
            if node.domain == "lensc":
                if node.op_type not in LOWERINGS:
                    raise GraphError(f"graph {self._spec.name}: no lowering of lensc.{node.op_type} for an NPU")
                LOWERINGS[node.op_type](Nodes(self._ir, self._graph, node), node, inputs)
        self._model.functions.clear()
        if self._spec.states:
            self._model.opset_imports[""] = max(OPSET, self._model.opset_imports[""])
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
        for name in REPLACED:
            unused = [i for i, v in enumerate(self._graph.inputs) if v.name == name and not v.uses()]
            for i in unused:
                del self._graph.inputs[i]
        self._model.opset_imports.pop("lensc", None)
        return self._model

    def _add_inputs(self) -> None:
        """What positions decide comes from the host; a form of one token has logits of that."""
        ir = self._ir
        call = next(node for node in self._graph if node.op_type == "CausalAttention")
        groups, width = (call.attributes[name].as_int() for name in ("groups", "head_dim"))
        for name, shape in decoder_inputs(self._form, groups, width).items():
            self._graph.inputs.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)))
        positions = next(value for value in self._graph.inputs if value.name == "logit_positions")
        positions.type = ir.TensorType(ir.DataType.INT32)
        chosen = next(
            node for node in self._graph if node.op_type == "Gather" and _comes_from(node.inputs[1], positions)
        )
        if self._form.sizes["tokens"] > 1:
            chosen.replace_input_with(1, positions)
        else:
            chosen.outputs[0].replace_all_uses_with(chosen.inputs[0])
            self._graph.remove(chosen, safe=True)

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
        old.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)
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
        stored = values.const_value
        bits = ir.DataType.INT8 if stored.dtype in (ir.DataType.INT8, ir.DataType.UINT8) else ir.DataType.INT4

        def turned_values() -> Any:
            # when it is written: all weights of a decoder at once would be gigabytes
            return ir.Tensor(np.ascontiguousarray((stored.numpy().astype(np.int8) - middle).T), dtype=bits)

        name, shape = f"{values.name}.turned", ir.Shape(reversed(stored.shape.numpy()))
        turned = [
            register(ir, self._graph, ir.LazyTensor(turned_values, dtype=bits, shape=shape, name=name)),
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


def _comes_from(value: Any, source: Any) -> bool:
    """Whether `value` is `source`, maybe in another shape."""
    producer = value.producer()
    return value is source or (
        producer is not None and producer.op_type == "Reshape" and _comes_from(producer.inputs[0], source)
    )


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
