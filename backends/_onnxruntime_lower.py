"""Portable graph -> ONNX Runtime's own operators, before anything of the engine runs.

    lensc.RMSNorm                    SimplifiedLayerNormalization, with a sum before it SkipSimplifiedLayerNormalization
    lensc.CausalAttention            GroupQueryAttention: rotary inside, KV cache appended in place
    lensc.Attention                  MultiHeadAttention, apart for slices with masked keys and for those without
    x * Sigmoid(x)                   QuickGelu, alpha 1
    quantized linears                see `_onnxruntime_quantized`

GroupQueryAttention wants its cache as [batch, kv_heads, capacity, head_dim] and returns it whole, so a lowered decoder
has other inputs and outputs than its `GraphSpec`: `_onnxruntime_cache` is the session that knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec

from ._onnxruntime_kv import scale_nodes
from ._onnxruntime_quantized import join_attention_inputs, lower_linears
from .errors import GraphError

DOMAIN = "lensc"
CONTRIB = "com.microsoft"

LENGTHS = "seqlens_k"
"""Input int32[batch]: tokens in the cache after the run, less one."""

TOTAL = "total_sequence_length"
"""Input int32[]: tokens in the cache after the run."""


SCALES = "kv_scales"
"""Of an int8 cache, input and output float32[layers * 2 * channels]: the scales of each layer's keys, then values."""

NEW_SCALES = "new_kv_scales"

WIDEN = "widen_scales"
"""Of an int8 cache, input bool[]: the scales fed are made as wide as the tokens of this run need."""


def present_name(past: str) -> str:
    """The output that shares its buffer with the cache input `past`."""
    return past.replace("past_", "present_")


def lower(model: Any, spec: GraphSpec, activation_bits: int = 32, kv_bits: int | None = None) -> Any:
    """Rewrite an `onnx_ir.Model` in place and return it. Raises GraphError for what has no lowering.

    `kv_bits` 8 stores keys and values in int8, None in float32.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    graph = model.graph
    rewriting = _Lowering(ir, graph, spec, kv_bits == 8)
    for node in list(graph):
        if node.domain == DOMAIN:
            rewriting.lower(node)
    rewriting.end_scales()
    lower_linears(ir, graph, activation_bits)
    join_attention_inputs(ir, graph)
    rewriting.fuse_silu()
    rewriting.fuse_skip_norms()
    model.functions.clear()
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[CONTRIB] = 1
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
    return model


class _Lowering:
    """The rewrites of one graph."""

    def __init__(self, ir: Any, graph: Any, spec: GraphSpec, int8_cache: bool) -> None:
        self._int8_cache = int8_cache
        self._scales_in: Any = ()
        self._scales_out: dict[int, Any] = {}
        self._ir = ir
        self._graph = graph
        self._spec = spec
        self._lengths: tuple[Any, Any] | None = None
        self._tables: dict[bytes, tuple[Any, Any]] = {}
        self._masked: dict[str, Any] = {}

    def lower(self, node: Any) -> None:
        known = {
            "RMSNorm": self._rms_norm,
            "CausalAttention": self._causal_attention,
            "Attention": self._attention,
        }
        if node.op_type not in known:
            raise GraphError(f"graph {self._spec.name}: lensc.{node.op_type} is not known to backend onnxruntime")
        known[node.op_type](node)

    def _rms_norm(self, node: Any) -> None:
        new = self._node("", "SimplifiedLayerNormalization", node.inputs, {
            "axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1,
        })  # fmt: skip
        self._swap(node, new)

    def _attention(self, node: Any) -> None:
        """With a key bias that is not zero the operator wants it in full, [slices, 1, queries, keys], and computes all
        logits at once; without one it goes through them in blocks that stay in the cache, several times faster. Which
        it is, is known when the graph runs.
        """
        query, key, value, bias = node.inputs
        if query.shape is not None and query.shape[0] == 1:  # the resampler's queries are shared by all slices
            slices = self._insert(node, self._node("", "Shape", [key], {"start": 0, "end": 1}))
            whole = self._insert(node, self._node("", "Concat", [slices, self._ints([1, 1])], {"axis": 0}))
            query = self._insert(node, self._node("", "Expand", [query, whole]))
        attributes = {
            "num_heads": node.attributes["num_heads"].as_int(), "scale": node.attributes["scale"].as_float()
        }  # fmt: skip

        def branch(name: str, full: Any | None, before: list[Any]) -> Any:
            inputs = [query, key, value, None, None, full][: 6 if full is not None else 3]
            attend = self._node(CONTRIB, "MultiHeadAttention", inputs, attributes)
            attend.outputs[0].name = f"{node.outputs[0].name}/{name}"
            attend.outputs[0].type, attend.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            return self._ir.Graph([], attend.outputs, nodes=[*before, attend], name=name)

        rows = self._node("", "Shape", [query], {"start": 1, "end": 2})
        shape = self._node("", "Concat", [self._ints([1, 1]), rows.outputs[0], self._ints([1])], {"axis": 0})
        bias_4 = self._node("", "Unsqueeze", [bias, self._ints([1, 2])])
        full = self._node("", "Expand", [bias_4.outputs[0], shape.outputs[0]])
        for i, made in enumerate((rows, shape, bias_4, full)):
            made.outputs[0].name = f"{node.outputs[0].name}/bias_{i}"
        masked = branch("masked", full.outputs[0], [rows, shape, bias_4, full])
        choose = self._ir.Node(
            "", "If", [self._is_masked(node, bias)],
            [self._ir.AttrGraph("then_branch", masked), self._ir.AttrGraph("else_branch", branch("free", None, []))],
            num_outputs=1,
        )  # fmt: skip
        self._swap(node, choose)

    def _is_masked(self, before: Any, bias: Any) -> Any:
        """Whether any key of any slice has a bias: bool[]."""
        if bias.name not in self._masked:
            low = self._insert(before, self._node("", "ReduceMin", [bias], {"keepdims": 0}))
            zero = self._constant(np.array(0, np.float32), "zero")
            self._masked[bias.name] = self._insert(before, self._node("", "Less", [low, zero]))
        return self._masked[bias.name]

    def _ints(self, values: list[int]) -> Any:
        return self._constant(np.array(values, np.int64))

    def _causal_attention(self, node: Any) -> None:
        query, key, value, _, frequencies, past_key, past_value = node.inputs
        lengths, total = self._length_inputs()
        cos, sin = self._rotary_tables(frequencies)
        heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        caches = [
            self._cache_input(past, kv_heads, node.attributes["head_dim"].as_int()) for past in (past_key, past_value)
        ]
        attributes = {
            "num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 0,
            "scale": node.attributes["scale"].as_float(),
        }  # fmt: skip
        inputs = [query, key, value, *caches, lengths, total, cos, sin]
        if self._int8_cache:
            attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
            head_dim = node.attributes["head_dim"].as_int()
            states = [pair.input for pair in self._spec.states]
            places = [states.index(past.name) for past in (past_key, past_value)]
            inputs += [None, None, None, *self._scales(node, (key, value), places, (kv_heads, head_dim))]
        new = self._node(CONTRIB, "GroupQueryAttention", inputs, attributes, outputs=3)
        for old, present, cache in zip(node.outputs[1:], new.outputs[1:], caches, strict=True):
            index = next(i for i, output in enumerate(self._graph.outputs) if output is old)
            present.name = present_name(cache.name)
            present.type, present.shape = cache.type, cache.shape
            self._graph.outputs[index] = present
        self._swap(node, new, outputs=1)

    def _length_inputs(self) -> tuple[Any, Any]:
        """The two inputs that say how far the cache is filled, made once."""
        if self._lengths is None:
            int32 = self._ir.TensorType(self._ir.DataType.INT32)
            self._lengths = (
                self._ir.Value(name=LENGTHS, type=int32, shape=self._ir.Shape(["batch"])),
                self._ir.Value(name=TOTAL, type=int32, shape=self._ir.Shape([])),
            )
            self._graph.inputs.extend(self._lengths)
        return self._lengths

    def _cache_input(self, past: Any, kv_heads: int, head_dim: int) -> Any:
        """The cache in the place of the past rows, under the same name."""
        kind = self._ir.TensorType(self._ir.DataType.INT8) if self._int8_cache else past.type
        cache = self._ir.Value(
            name=past.name, type=kind, shape=self._ir.Shape(["batch", kv_heads, "capacity", head_dim])
        )
        self._graph.inputs[next(i for i, value in enumerate(self._graph.inputs) if value is past)] = cache
        return cache

    def _scales(self, before: Any, rows: tuple[Any, Any], places: list[int], sizes: tuple[int, int]) -> list[Any]:
        """The scales of a layer's keys and values: those fed, widened for `rows` if this is asked for.

        `places` is where they stand among those of all layers, `sizes` are kv_heads and head_dim.
        """
        ir, count, channels = self._ir, len(self._spec.states), sizes[0] * sizes[1]
        if not self._scales_in:
            whole = self._float(SCALES, count * channels)
            self._widen = ir.Value(name=WIDEN, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
            self._graph.inputs.extend([whole, self._widen])
            split = self._node("", "Split", [whole], {"axis": 0, "num_outputs": count}, outputs=count)
            self._insert(before, split)
            self._scales_in = split.outputs

        def make(kind: str, inputs: Any, attributes: dict[str, int]) -> Any:
            values = [self._constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
            return self._node("", kind, values, attributes)

        name = f"{before.outputs[0].name}/scales"
        chains = {
            "then": [
                scale_nodes(make, new, self._scales_in[place], *sizes, is_key)
                for new, place, is_key in zip(rows, places, (True, False), strict=True)
            ],
            "else": [[make("Identity", [self._scales_in[place]], {})] for place in places],
        }
        branches = []
        for branch, made in chains.items():
            nodes = [node for chain in made for node in chain]
            for i, node in enumerate(nodes):
                node.outputs[0].name = f"{name}/{branch}_{i}"
            ends = [self._float(chain[-1].outputs[0].name, channels, chain[-1].outputs[0]) for chain in made]
            branches.append(ir.AttrGraph(f"{branch}_branch", ir.Graph([], ends, nodes=nodes, name=f"{name}/{branch}")))
        chosen = ir.Node("", "If", [self._widen], branches, num_outputs=2)
        self._insert(before, chosen)
        for place, output in zip(places, chosen.outputs, strict=True):
            self._scales_out[place] = self._float(output.name, channels, output)
        return list(chosen.outputs)

    def end_scales(self) -> None:
        """The scales of all layers as one output."""
        if self._scales_out:
            parts = [self._scales_out[place] for place in range(len(self._scales_out))]
            join = self._node("", "Concat", parts, {"axis": 0})
            self._graph.append(join)
            size = sum(int(part.shape[0]) for part in parts)
            self._graph.outputs.append(self._float(NEW_SCALES, size, join.outputs[0]))

    def _float(self, name: str | None, size: int, value: Any = None) -> Any:
        """`value`, or a new one, as float32[size] called `name`."""
        ir = self._ir
        value = ir.Value() if value is None else value
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([size])
        return value

    def _rotary_tables(self, frequencies: Any) -> tuple[Any, Any]:
        """cos and sin of every position of the context, float32[context, head_dim / 2]."""
        tensor = frequencies.const_value
        if tensor is None:
            raise GraphError(f"graph {self._spec.name}: the rotary frequencies {frequencies.name} are not a constant")
        values = tensor.numpy()
        if values.tobytes() not in self._tables:
            positions = np.arange(self._spec.dims["past"].max, dtype=np.float32)
            angles = positions[:, None] * values[None, :]
            tables = (self._constant(np.cos(angles), "rotary_cos"), self._constant(np.sin(angles), "rotary_sin"))
            self._tables[values.tobytes()] = tables
        return self._tables[values.tobytes()]

    def fuse_silu(self) -> None:
        """x * Sigmoid(x) in one pass."""
        for node in list(self._graph):
            if node.op_type != "Mul" or node.domain:
                continue
            for x, gate in (node.inputs, node.inputs[::-1]):
                sigmoid = gate.producer()
                if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x:
                    self._swap(node, self._node(CONTRIB, "QuickGelu", [x], {"alpha": 1.0}))
                    break

    def fuse_skip_norms(self) -> None:
        """A sum of two tensors of one shape and the RMS norm after it in one operator, which returns the sum as well.

        Not so for LayerNormalization: its fused form takes 2.5 ms for 1024 x 1152 on two cores, sum and norm 1.5.
        """
        for node in list(self._graph):
            if node.op_type != "SimplifiedLayerNormalization" or node.domain:
                continue
            total = node.inputs[0]
            add = total.producer()
            if add is None or add.op_type != "Add" or any(v.const_value is not None for v in add.inputs):
                continue
            if total.is_graph_output() or add.inputs[0].shape != add.inputs[1].shape or add.inputs[0].shape is None:
                continue
            attributes = {"epsilon": node.attributes["epsilon"].as_float()}
            inputs = [*add.inputs, *node.inputs[1:]]
            new = self._node(CONTRIB, "SkipSimplifiedLayerNormalization", inputs, attributes, outputs=4)
            new.outputs[1].name = new.outputs[2].name = ""
            # in the place of the sum, which others read before the norm
            self._graph.insert_after(add, new)
            new.outputs[0].type, new.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            new.outputs[3].type, new.outputs[3].shape = total.type, total.shape
            total.replace_all_uses_with(new.outputs[3])
            node.outputs[0].replace_all_uses_with(new.outputs[0])
            self._graph.remove([node, add], safe=True)

    # --- building -------------------------------------------------------------------------------------------------

    def _node(
        self,
        domain: str,
        kind: str,
        inputs: Any,
        attributes: Mapping[str, int | float | str] | None = None,
        outputs: int = 1,
    ) -> Any:
        ir = self._ir
        made = [_attribute(ir, name, value) for name, value in (attributes or {}).items()]
        return ir.Node(domain, kind, list(inputs), made, num_outputs=outputs)

    def _insert(self, before: Any, node: Any) -> Any:
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, array: np.typing.NDArray[Any], name: str | None = None) -> Any:
        """An initializer; equal small ones are made once."""
        name = name or "const_" + "_".join([str(array.dtype), *map(str, array.ravel())])
        if name not in self._graph.initializers:
            tensor = self._ir.Tensor(array, name=name)
            value = self._ir.Value(
                name=name, type=self._ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _swap(self, old: Any, new: Any, outputs: int | None = None) -> None:
        """Put `new` in the place of `old`; the first `outputs` of its outputs take over names and readers."""
        self._graph.insert_before(old, new)
        for before, after in list(zip(old.outputs, new.outputs, strict=True))[:outputs]:
            after.type, after.shape = before.type, before.shape
            if before.is_graph_output():
                index = next(i for i, value in enumerate(self._graph.outputs) if value is before)
                after.name = before.name
                self._graph.outputs[index] = after
            before.replace_all_uses_with(after)
        self._graph.remove(old, safe=True)


def _attribute(ir: Any, name: str, value: float | str) -> Any:
    if isinstance(value, str):
        return ir.AttrString(name, value)
    return ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
