"""The functions of the domain `lensc` in plain operators of rank 4 at most, as an NPU takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .base import Array
from .errors import GraphError

OPSET = 23
"""The first that has RMSNormalization: made of its parts, the square of an outlier takes the resolution from all others."""


class Nodes:
    """Makes the nodes that stand for one call, in front of it."""

    def __init__(self, ir: Any, graph: Any, call: Any) -> None:
        self._ir, self._graph, self._call = ir, graph, call
        self._name = call.outputs[0].name

    def make(self, kind: str, inputs: list[Any], part: str, **attributes: Any) -> Any:
        """The output of a new node; attributes are integers, lists of integers, or floats."""
        ir = self._ir
        of_type = {list: ir.AttrInt64s, int: ir.AttrInt64, float: ir.AttrFloat32}
        made = [of_type[type(value)](name, value) for name, value in attributes.items()]
        node = ir.Node("", kind, inputs, made, num_outputs=1)
        node.outputs[0].name = f"{self._name}.{part}"
        self._graph.insert_before(self._call, node)
        return node.outputs[0]

    def reshape(self, value: Any, shape: list[int], part: str) -> Any:
        """`value` in another shape; 0 keeps a dimension."""
        name = f"to_{'_'.join(map(str, shape))}"
        return self.make("Reshape", [value, self.constant(np.array(shape, np.int64), name)], part)

    def part_of(self, value: Any, start: int, stop: int, part: str) -> Any:
        """A piece of the last dimension."""
        ends = (self.constant(np.array([n], np.int64), f"at_{n}") for n in (start, stop, -1))
        return self.make("Slice", [value, *ends], part)

    def constant(self, array: Array, name: str) -> Any:
        """An initializer; the same one for the same name."""
        return constant(self._ir, self._graph, array, name)

    def replace(self, outputs: list[Any]) -> None:
        """Let `outputs` stand for those of the call, under their names, and remove the call."""
        for old, new in zip(self._call.outputs, outputs, strict=True):
            name = old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, name
        self._graph.remove(self._call, safe=True)


def attention(nodes: Nodes, call: Any, inputs: Mapping[str, Any]) -> None:
    """softmax(q * scale @ k^T + bias) @ v, heads in front."""
    query, key, value, bias = call.inputs
    heads, scale = call.attributes["num_heads"].as_int(), call.attributes["scale"].as_float()
    split = [0, 0, heads, -1]
    query_4 = nodes.reshape(query, split, "query_4")
    key_4 = nodes.reshape(key, split, "key_4")
    value_4 = nodes.reshape(value, split, "value_4")
    query_h = nodes.make("Transpose", [query_4], "query_h", perm=[0, 2, 1, 3])
    key_h = nodes.make("Transpose", [key_4], "key_h", perm=[0, 2, 3, 1])
    value_h = nodes.make("Transpose", [value_4], "value_h", perm=[0, 2, 1, 3])
    axes = nodes.constant(np.array([1, 2], np.int64), "axes_1_2")
    mixed_h = _mix(nodes, query_h, scale, key_h, value_h, nodes.make("Unsqueeze", [bias, axes], "bias_4"))
    mixed_4 = nodes.make("Transpose", [mixed_h], "mixed_4", perm=[0, 2, 1, 3])
    nodes.replace([nodes.reshape(mixed_4, [0, 0, -1], "mixed")])


def causal_attention(nodes: Nodes, call: Any, inputs: Mapping[str, Any]) -> None:
    """Rotary embedding, old and new keys and values behind one another, and attention in groups of heads.

    The heads that share keys are rows of one product. Who sees whom is said by the input `attention_bias` for each of them.
    A Reshape stands behind every Transpose: through one alone, ONNX Runtime moves transposes of old rows to where the HTP
    refuses them.
    """
    query, key, value, _, _, past_key, past_value = call.inputs
    heads, kv_heads, width = (call.attributes[n].as_int() for n in ("num_heads", "kv_num_heads", "head_dim"))
    query_3 = _rotated(nodes, query, heads, width, inputs, "query")
    query_t = nodes.make("Transpose", [query_3], "query_t", perm=[1, 0, 2])
    query_h = nodes.reshape(query_t, [1, kv_heads, -1, width], "query_h")
    key_3 = _rotated(nodes, key, kv_heads, width, inputs, "key")
    key_t = nodes.make("Transpose", [key_3], "key_t", perm=[1, 2, 0])
    new_key = nodes.reshape(key_t, [1, kv_heads, width, -1], "new_key")
    value_3 = nodes.reshape(value, [-1, kv_heads, width], "value_3")
    value_t = nodes.make("Transpose", [value_3], "value_t", perm=[1, 0, 2])
    new_value = nodes.reshape(value_t, [1, kv_heads, -1, width], "new_value")
    keys = nodes.make("Concat", [past_key, new_key], "keys", axis=3)
    values = nodes.make("Concat", [past_value, new_value], "values", axis=2)
    scale = call.attributes["scale"].as_float()
    mixed_h = _mix(nodes, query_h, scale, keys, values, inputs["attention_bias"])
    mixed_t = nodes.reshape(mixed_h, [heads, -1, width], "mixed_t")
    mixed_3 = nodes.make("Transpose", [mixed_t], "mixed_3", perm=[1, 0, 2])
    nodes.replace([nodes.reshape(mixed_3, [1, -1, heads * width], "mixed"), new_key, new_value])


def rms_norm(nodes: Nodes, call: Any, inputs: Mapping[str, Any]) -> None:
    """One operator from opset 23 on."""
    epsilon = call.attributes["epsilon"].as_float()
    nodes.replace([nodes.make("RMSNormalization", list(call.inputs), "normal", axis=-1, epsilon=epsilon)])


LOWERINGS: dict[str, Callable[[Nodes, Any, Mapping[str, Any]], None]] = {
    "Attention": attention,
    "CausalAttention": causal_attention,
    "RMSNorm": rms_norm,
}
"""By function; each is given the call and the graph's inputs by name."""


def _mix(nodes: Nodes, query: Any, scale: float, key: Any, value: Any, bias: Any) -> Any:
    scaled = nodes.make("Mul", [query, nodes.constant(np.array([scale], np.float32), f"scale_{scale}")], "scaled")
    scores = nodes.make("MatMul", [scaled, key], "scores")
    masked = nodes.make("Add", [scores, bias], "masked")
    weights = nodes.make("Softmax", [masked], "weights", axis=-1)
    return nodes.make("MatMul", [weights, value], "mixed_h")


def _rotated(nodes: Nodes, value: Any, heads: int, width: int, inputs: Mapping[str, Any], part: str) -> Any:
    """[tokens, heads, width], turned: the first half of each head is the real part, the second the imaginary one."""
    if width % 2:
        raise GraphError(f"heads of {width}: rotary embedding needs an even width")
    whole = nodes.reshape(value, [-1, heads, width], f"{part}_heads")
    real = nodes.part_of(whole, 0, width // 2, f"{part}_real")
    imaginary = nodes.part_of(whole, width // 2, width, f"{part}_imaginary")
    cos, sin = inputs["rope_cos"], inputs["rope_sin"]
    parts = []
    for name, kind, first, second in (("real", "Sub", cos, sin), ("imaginary", "Add", sin, cos)):
        left = nodes.make("Mul", [real, first], f"{part}_{name}_left")
        right = nodes.make("Mul", [imaginary, second], f"{part}_{name}_right")
        parts.append(nodes.make(kind, [left, right], f"{part}_{name}_turned"))
    return nodes.make("Concat", parts, f"{part}_rotated", axis=2)


def constant(ir: Any, graph: Any, array: Array, name: str, dtype: Any = None) -> Any:
    """The initializer `name` of `graph`, made of `array` if there is none."""
    return register(ir, graph, ir.Tensor(array, dtype=dtype, name=name))


def register(ir: Any, graph: Any, tensor: Any) -> Any:
    """The initializer of the name of `tensor`, made of it if there is none."""
    if tensor.name not in graph.initializers:
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[tensor.name]
