"""Portable graph -> OpenVINO: what the functions of domain `lensc` become, and a cache that the engine keeps.

Two steps, because the first needs onnx and the second happens wherever the artifact is loaded:

    lower   rewrites the ONNX file: functions stay as bare calls, their definitions go, and every CausalAttention names
            two states instead of being fed a past; the weights' file is not touched
    read    converts the rewritten file, replacing each call by the subgraph that OpenVINO's plugins fuse:
            RMSNorm -> RMS; Attention -> ScaledDotProductAttention; CausalAttention -> RoPE, and a
            ScaledDotProductAttention whose keys and values come from ReadValue, are reordered by `beam_idx` and go to
            Assign, which the CPU's plugin turns into one operator that appends to its cache in place
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec

from .errors import GraphError

DOMAIN = "lensc"

HIDDEN = -1e4
"""What portable graphs add to the logit of a key that must not be seen."""

BEAMS = "beam_idx"
"""Input int32[batch] of a lowered decoder: sequence i of this run continues sequence `beam_idx[i]` of the cache."""

FLOAT_PRODUCTS, INT8_PRODUCTS = "float", "int8"
INT8_LEVELS = 255
"""-127 to 127: without -128 there is no zero point."""

TINY = 1e-20
"""In the place of the largest magnitude of a row of zeros."""

PAST = "past_length"
"""Input int64[1] of a lowered decoder: how many tokens the cache holds. Asked of a state, the length would keep OpenVINO
from seeing that the state is a cache."""


def lower(model: Any, spec: GraphSpec) -> None:
    """Rewrite an `onnx.ModelProto` in place. Raises GraphError for a call that has no lowering."""
    from onnx import TensorProto, helper

    graph = model.graph
    calls = [node for node in graph.node if node.domain == DOMAIN]
    unknown = sorted({node.op_type for node in calls} - {"RMSNorm", "Attention", "CausalAttention"})
    if unknown:
        raise GraphError(f"graph {spec.name}: no lowering of {DOMAIN}.{unknown[0]} for OpenVINO")
    del model.functions[:]
    attentions = [node for node in calls if node.op_type == "CausalAttention"]
    if not attentions:
        return
    _check_states(attentions, spec)
    for node in attentions:
        states = [
            helper.make_attribute("key_state", node.input[5]),
            helper.make_attribute("value_state", node.input[6]),
        ]
        node.attribute.extend(states)
        node.input[5], node.input[6] = BEAMS, PAST
        del node.output[1:]
    fed = {pair.input for pair in spec.states}
    inputs = [value for value in graph.input if value.name not in fed]
    beams = helper.make_tensor_value_info(BEAMS, TensorProto.INT32, ["batch"])
    past = helper.make_tensor_value_info(PAST, TensorProto.INT64, [1])
    _replace(graph.input, [*inputs, beams, past])
    made = {pair.output for pair in spec.states}
    _replace(graph.output, [value for value in graph.output if value.name not in made])


def read(path: Path, attention: str = "f32", products: str = FLOAT_PRODUCTS) -> Any:
    """The `openvino.Model` of a lowered file, with attention computed in `attention`: `f32` or `bf16`.

    With `products` of `INT8_PRODUCTS` inputs of int8 weights are quantized by the graph. Weights are mapped from the file
    beside it, not read.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.onnx import ConversionExtension

    frontend = FrontEndManager().load_by_framework("onnx")
    lowering = _Lowering(attention)
    for name, convert in lowering.conversions().items():
        frontend.add_extension(ConversionExtension(name, DOMAIN, convert))
    model = frontend.convert(frontend.load(str(path)))
    if lowering.sinks:
        model.add_sinks(lowering.sinks)
        model.validate_nodes_and_infer_types()
    _fold_products(model)
    if products == INT8_PRODUCTS:
        _quantize_inputs(model)
    return model


def _fold_products(model: Any) -> None:
    """Compute the products that no input reaches, such as the projection of learned queries.

    OpenVINO 2026.4 does so itself, except where the weights are quantized: there it fails on its own placeholder for
    an absent bias ("Check 'm_element_type.is_static()' failed").
    """
    import openvino as ov
    from openvino.passes import ConstantFolding, Manager

    reached: set[str] = set()
    constant = []
    for node in model.get_ordered_ops():
        sources = {value.get_node().get_friendly_name() for value in node.input_values()}
        if node.get_type_name() in ("Parameter", "ReadValue") or sources & reached:
            reached.add(node.get_friendly_name())
        elif node.get_type_name() == "MatMul":
            constant.append(node)
    for node in constant:
        manager = Manager()
        manager.register_pass(ConstantFolding())
        manager.run_passes(ov.Model([node.output(0)], [], "product"))


def _quantize_inputs(model: Any) -> None:
    """Let every product with int8 weights that have one scale an output be one of int8.

    Each row of an input is divided by its largest magnitude, rounded to 255 levels of -1 to 1, and the product multiplied
    by it again. With limits that are constants OpenVINO computes in int8 (AMX, VNNI); left to its own dynamic
    quantization it never uses AMX, and unpacks weights in every run. A full-size vision slice on two cores with AMX took
    2.5 s so, and takes 1.0 s, with 0.7 dB more noise.
    """
    from openvino import opset13 as op

    rows: dict[tuple[str, int], tuple[Any, Any]] = {}
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or not _has_int8_weight(product):
            continue
        x = product.input_value(0)
        key = (x.get_node().get_name(), x.get_index())
        if key not in rows:
            largest = op.maximum(op.reduce_max(op.abs(x), _i64(-1), True), _f32(TINY))
            low, high = _f32(-1), _f32(1)
            rows[key] = (op.fake_quantize(op.divide(x, largest), low, high, low, high, INT8_LEVELS), largest)
        quantized, largest = rows[key]
        made, readers = product.output(0), list(product.output(0).get_target_inputs())
        product.input(0).replace_source_output(quantized.output(0))
        whole = op.multiply(product, largest).output(0)
        whole.set_names(made.get_names())
        made.set_names(set())
        for reader in readers:
            reader.replace_source_output(whole)
    model.validate_nodes_and_infer_types()


def _has_int8_weight(product: Any) -> bool:
    """Whether the weight of a MatMul is an int8 constant with one scale an output."""
    value = product.input_value(1)
    while value.get_node().get_type_name() in ("Convert", "Multiply", "Transpose"):
        value = value.get_node().input_value(0)
    return bool(value.get_node().get_type_name() == "Constant" and value.get_element_type().to_string() == "i8")


class _Lowering:
    """The conversions of one graph; `sinks` are the Assign nodes they made."""

    def __init__(self, attention: str) -> None:
        self.sinks: list[Any] = []
        self._attention = attention
        self._rotation: tuple[Any, Any] | None = None
        self._batch: Any = None
        self._mask: Any = None

    def conversions(self) -> dict[str, Callable[[Any], list[Any]]]:
        """By the name of the function."""
        return {"RMSNorm": self.rms_norm, "Attention": self.attention, "CausalAttention": self.causal_attention}

    def rms_norm(self, node: Any) -> list[Any]:
        """x * (1 / sqrt(mean(x^2) + epsilon)) * weight: the form that is fused."""
        from openvino import opset13 as op

        x, weight = node.get_input(0), node.get_input(1)
        power = op.reduce_mean(op.power(x, _f32(2)), _i64(-1), keep_dims=True)
        root = op.sqrt(op.add(power, _f32(node.get_attribute("epsilon"))))
        return [op.multiply(op.multiply(x, op.divide(_f32(1), root)), weight).output(0)]

    def attention(self, node: Any) -> list[Any]:
        """Every query sees every key; the bias is one number per key."""
        from openvino import opset13 as op

        query, key, value, bias = (node.get_input(i) for i in range(4))
        heads, scale = node.get_attribute("num_heads"), _f32(node.get_attribute("scale"))
        width = int(query.get_partial_shape()[2].get_length())
        q, k, v = (self._lowered(_split(x, heads, width // heads)) for x in (query, key, value))
        mask = self._lowered(op.unsqueeze(bias, _i64(1, 2)))
        mixed = op.scaled_dot_product_attention(q, k, v, mask, self._lowered(scale))
        return [_merge(self._raised(mixed), width)]

    def causal_attention(self, node: Any) -> list[Any]:
        """Past and new rows of a layer, kept in two states [batch, kv_heads, tokens, head_dim]."""
        from openvino import opset13 as op

        query, key, value, positions, frequencies, beams, past = (node.get_input(i) for i in range(7))
        heads, kv_heads, head_dim = (node.get_attribute(n) for n in ("num_heads", "kv_num_heads", "head_dim"))
        if self._rotation is None:
            self._rotation = _rotation(positions, frequencies)
            self._batch = op.gather(op.shape_of(query), _i64(0), _i64(0))
            self._mask = self._lowered(_causal(positions, past))
        q = self._lowered(_rotate(_split(query, heads, head_dim), *self._rotation, head_dim))
        k = self._lowered(_rotate(_split(key, kv_heads, head_dim), *self._rotation, head_dim))
        v = self._lowered(_split(value, kv_heads, head_dim))
        k = self._append(node.get_attribute("key_state"), k, beams, kv_heads, head_dim)
        v = self._append(node.get_attribute("value_state"), v, beams, kv_heads, head_dim)
        if heads != kv_heads:
            k, v = (_repeat(x, heads, kv_heads, head_dim) for x in (k, v))
        mixed = op.scaled_dot_product_attention(q, k, v, self._mask)
        return [_merge(self._raised(mixed), heads * head_dim)]

    def _append(self, name: str, rows: Any, beams: Any, kv_heads: int, head_dim: int) -> Any:
        """All rows of the state `name` with `rows` behind them, which become its value."""
        import openvino as ov
        from openvino import opset6
        from openvino import opset13 as op
        from openvino.op.util import Variable, VariableInfo

        info = VariableInfo()
        info.variable_id = name
        info.data_type = ov.Type.f32
        info.data_shape = ov.PartialShape([-1, kv_heads, -1, head_dim])
        variable = Variable(info)
        # without an initial value the batch of an empty state would be 0 and no beam of it
        empty = op.broadcast(_f32(0), op.concat([self._batch, _i64(kv_heads, 0, head_dim)], 0))
        past = op.gather(self._lowered(opset6.read_value(empty, variable)), beams, _i64(0))
        present = op.concat([past, rows], 2)
        self.sinks.append(opset6.assign(self._raised(present), variable))
        return present

    def _lowered(self, x: Any) -> Any:
        """`x` in the precision of attention."""
        from openvino import opset13 as op

        return x if self._attention == "f32" else op.convert(x, self._attention)

    def _raised(self, x: Any) -> Any:
        """`x`, which is in the precision of attention, in float32."""
        from openvino import opset13 as op

        return x if self._attention == "f32" else op.convert(x, "f32")


def _causal(positions: Any, past: Any) -> Any:
    """What is added to scores, float32[1, 1, tokens, past + tokens]: a token sees all `past`, int64[1], of the cache,
    and new tokens of its own and smaller positions.
    """
    from openvino import opset13 as op

    rows, columns = op.unsqueeze(positions, _i64(1)), op.unsqueeze(positions, _i64(0))
    new = op.select(op.greater_equal(rows, columns), _f32(0), _f32(HIDDEN))
    seen = op.broadcast(_f32(0), op.concat([op.shape_of(positions), past], 0))
    return op.unsqueeze(op.concat([seen, new], 1), _i64(0, 1))


def _rotation(positions: Any, frequencies: Any) -> tuple[Any, Any]:
    """cos and sin of every position, float32[1, 1, tokens, head_dim]: both halves have the same angles."""
    from openvino import opset13 as op

    angles = op.multiply(op.convert(op.unsqueeze(positions, _i64(1)), "f32"), op.unsqueeze(frequencies, _i64(0)))
    both = op.unsqueeze(op.concat([angles, angles], 1), _i64(0, 1))
    return op.cos(both), op.sin(both)


def _rotate(x: Any, cos: Any, sin: Any, head_dim: int) -> Any:
    """Rotate pairs (i, i + head_dim / 2) of x: [batch, heads, tokens, head_dim]."""
    from openvino import opset13 as op

    halves = op.variadic_split(x, _i64_scalar(3), _i64(head_dim // 2, head_dim // 2))
    turned = op.concat([op.multiply(halves.output(1), _f32(-1)), halves.output(0)], -1)
    return op.add(op.multiply(x, cos), op.multiply(turned, sin))


def _split(x: Any, heads: int, head_dim: int) -> Any:
    """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
    from openvino import opset13 as op

    return op.transpose(op.reshape(x, _i64(0, 0, heads, head_dim), True), _i64(0, 2, 1, 3))


def _merge(x: Any, width: int) -> Any:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, width], as an output of a conversion."""
    from openvino import opset13 as op

    return op.reshape(op.transpose(x, _i64(0, 2, 1, 3)), _i64(0, 0, width), True).output(0)


def _repeat(x: Any, heads: int, kv_heads: int, head_dim: int) -> Any:
    """Every key/value head once for each query head that shares it; the fused operator does not do it in memory."""
    from openvino import opset13 as op

    groups = op.broadcast(op.unsqueeze(x, _i64(2)), _i64(1, 1, heads // kv_heads, 1, 1), broadcast_spec="BIDIRECTIONAL")
    return op.reshape(groups, _i64(0, heads, -1, head_dim), True)


def _check_states(attentions: Sequence[Any], spec: GraphSpec) -> None:
    """Every state must belong to one attention; all attentions must share their positions, their frequencies and the
    usual scale. Raises GraphError.
    """
    named = [name for node in attentions for name in node.input[5:7]]
    if sorted(named) != sorted(pair.input for pair in spec.states):
        raise GraphError(f"graph {spec.name}: CausalAttention reads {named}, which are not the states of its spec")
    if len({tuple(node.input[3:5]) for node in attentions}) != 1:
        raise GraphError(f"graph {spec.name}: expected the same position_ids in every CausalAttention")
    for node in attentions:
        values = {attribute.name: attribute for attribute in node.attribute}
        scale, head_dim = values["scale"].f, values["head_dim"].i
        if not np.isclose(scale, head_dim**-0.5, rtol=1e-6):
            raise GraphError(f"graph {spec.name}: CausalAttention with scale {scale}, expected {head_dim**-0.5}")


def _replace(values: Any, kept: list[Any]) -> None:
    """Set a repeated field, which cannot be assigned; `kept` may hold elements of it."""
    copies = [type(value).FromString(value.SerializeToString()) for value in kept]
    del values[:]
    values.extend(copies)


def _f32(value: float) -> Any:
    from openvino import opset13 as op

    return op.constant(np.float32(value))


def _i64(*values: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.array(values, np.int64))


def _i64_scalar(value: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.int64(value))
