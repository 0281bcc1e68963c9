"""Portable graph -> the strongly typed ONNX that TensorRT's parser is given: standard operators of opset 24 only.

    lensc.RMSNorm            RMSNormalization
    lensc.Attention          Attention, its bias as a mask over all queries
    lensc.CausalAttention    RotaryEmbedding, TensorScatter into caches of fixed room, Attention over the columns asked for
    quantized linears        see `_tensorrt_weights`

The parser makes TensorRT's own layers of them: TensorScatter, from a graph input to a graph output, becomes a KVCacheUpdate,
which writes in place. A strongly typed network computes in what its tensors are: products, attention and caches are in
`half`, the stream that layers add to, norms and rotation in float32, as in the backend `cuda`. Casts stand where they meet.

Being standard, the graph runs on other engines as well: it is held against the reference before TensorRT ever sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import Graph, GraphSpec

from ._portable import QuantizedLinear, model_of, quantized_linears
from ._tensorrt_target import COLUMNS, SPAN, WRITE, Half, capacity_of, present_name
from ._tensorrt_weights import (
    as_float,
    converted,
    fits_int4,
    int4_of,
    int4_offsets,
    int4_scales,
    int4_values,
    is_int8,
    numpy_of,
)
from .base import Array
from .errors import GraphError, UnsupportedError

OPSET, IR_VERSION = 24, 11
"""TensorScatter is of opset 24, which TensorRT's parser takes since 10.15; without block-wise weights of other types."""

IN_FLOAT32 = frozenset({"LayerNormalization", "RMSNormalization", "RotaryEmbedding"})
IN_HALF = frozenset({"MatMul", "Attention", "TensorScatter", "DequantizeLinear", "QuantizeLinear"})
KEPT = frozenset({"Cast", "Shape"})
"""Operators whose types stand as they are."""
MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze"})
"""Of a constant, in any type."""

INSIDE_BYTES = 1024
"""Tensors up to this size stay in the model's own file."""
ALIGNMENT = 64

Ranges = Mapping[str, tuple[float, float]]
"""Of activations by name: smallest and largest value seen."""


@dataclass
class Lowered:
    """The model, and what became of its weights: how many are stored how. `parameters` counts them all."""

    model: Any
    parameters: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, parameters: int) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.parameters += parameters


def write_lowered(
    graph: Graph, path: Path, half: Half, has_int8_products: bool = False, ranges: Ranges | None = None
) -> Lowered:
    """Lower `graph` and write it to `path`, with its weights in `<path>.data`, one at a time.

    Raises ExecutionError for a file that is not ONNX, what `lower` does, and OSError.
    """
    import onnx_ir as ir

    model = model_of(graph.path)
    lowered = lower(model, graph.spec, half, has_int8_products, ranges)
    data = path.with_name(path.name + ".data")
    with open(data, "wb") as file:
        for value in model.graph.initializers.values():
            tensor: Any = value.const_value
            name: Any = value.name
            if tensor.nbytes <= INSIDE_BYTES:
                if not isinstance(tensor, ir.Tensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
                continue
            file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            offset = file.tell()
            written = file.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                data.name, offset, written, tensor.dtype, shape=tensor.shape, name=name, base_dir=str(data.parent)
            )
    ir.save(model, path)
    return lowered


def lower(
    model: Any, spec: GraphSpec, half: Half, has_int8_products: bool = False, ranges: Ranges | None = None
) -> Lowered:
    """Rewrite an `onnx_ir.Model` in place.

    `has_int8_products`: linears of int8 with a scale per output are computed in int8, their inputs rounded to `ranges`;
    without ranges, to measure them, inputs stay floats. Raises GraphError for what has no lowering, UnsupportedError for an
    input without a range.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    lowering = _Lowering(ir, model, spec, half, has_int8_products, ranges)
    lowering.calls()
    lowering.linears()
    lowering.types()
    model.functions.clear()
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    initializers = model.graph.initializers
    for name in [n for n, value in initializers.items() if not value.uses() and not value.is_graph_output()]:
        del initializers[name]
    return lowering.lowered


class _Lowering:
    """The rewrites of one graph."""

    def __init__(
        self, ir: Any, model: Any, spec: GraphSpec, half: Half, has_int8_products: bool, ranges: Ranges | None
    ) -> None:
        self._ir, self._graph, self._spec = ir, model.graph, spec
        self._half = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}.get(half, ir.DataType.FLOAT)
        self._has_int8_products, self._ranges = has_int8_products, ranges
        self._before: Any = None
        self._shared: dict[Any, Any] = {}
        """What layers have in common, made where the first asks for it."""
        self.lowered = Lowered(model)

    # --- calls ----------------------------------------------------------------------------------------------------

    def calls(self) -> None:
        """Replace the functions of lensc."""
        known: dict[str, Callable[[Any], None]] = {
            "RMSNorm": self._rms_norm,
            "CausalAttention": self._causal_attention,
            "Attention": self._attention,
        }
        for node in list(self._graph):
            if node.domain == "lensc":
                if node.op_type not in known:
                    raise GraphError(f"graph {self._spec.name}: lensc.{node.op_type} is not known to backend tensorrt")
                self._before = node
                known[node.op_type](node)

    def _rms_norm(self, node: Any) -> None:
        epsilon = node.attributes["epsilon"].as_float()
        self._swap(node, self._add("RMSNormalization", node.inputs, axis=-1, epsilon=epsilon, stash_type=1))

    def _attention(self, node: Any) -> None:
        """The bias goes over all queries: TensorRT broadcasts a mask along slices and heads only."""
        query, key, value, bias = node.inputs
        heads = node.attributes["num_heads"].as_int()
        slices = self._once("slices", lambda: self._add("Shape", [key], start=0, end=1, dtype=self._ir.DataType.INT64))
        if query.shape is not None and query.shape[0] == 1:  # the resampler's queries are shared by all slices
            whole = self._add("Concat", [slices, self._ints(1, 1)], axis=0, dtype=self._ir.DataType.INT64)
            query = self._add("Expand", [query, whole])
        queries = self._add("Shape", [query], start=1, end=2, dtype=self._ir.DataType.INT64)

        def mask() -> Any:
            rows = self._add(
                "Concat", [self._ints(1, 1), queries, self._ints(1)], axis=0, dtype=self._ir.DataType.INT64
            )
            small = self._add("Cast", [bias], to=int(self._half), dtype=self._half)
            return self._add("Expand", [self._add("Unsqueeze", [small, self._ints(1, 2)]), rows])

        shape = node.inputs[0].shape
        full = self._once(("mask", bias.name, None if shape is None else str(shape[1])), mask)
        made = [self._split(x, heads, -1) for x in (query, key, value)]
        mixed = self._add("Attention", [*made, full], scale=node.attributes["scale"].as_float())
        self._swap(node, self._joined(mixed))

    def _causal_attention(self, node: Any) -> None:
        query, key, value, positions, frequencies, past_key, past_value = node.inputs
        heads, kv_heads, dim = (node.attributes[n].as_int() for n in ("num_heads", "kv_num_heads", "head_dim"))
        mask, write, columns = self._cache_inputs(positions)
        cos, sin, rows = self._rotation(positions, frequencies)

        def rotated(x: Any, count: int) -> Any:
            return self._add("RotaryEmbedding", [self._split(x, count, dim), cos, sin, rows], interleaved=0)

        seen: list[Any] = []
        for past, new in ((past_key, rotated(key, kv_heads)), (past_value, self._split(value, kv_heads, dim))):
            cache = self._cache(past, kv_heads, dim)
            present = self._add("TensorScatter", [cache, new, write], axis=2, mode="linear", dtype=self._half)
            present.name = present_name(past.name)
            present.type, present.shape = cache.type, cache.shape
            index = next(i for i, o in enumerate(self._graph.outputs) if o is node.outputs[1 + len(seen)])
            self._graph.outputs[index] = present
            ends = [self._ints(0), columns, self._ints(2)]
            seen.append(self._add("Slice", [present, *ends], dtype=self._half))
        scale = node.attributes["scale"].as_float()
        mixed = self._add("Attention", [rotated(query, heads), *seen, mask], scale=scale)
        self._swap(node, self._joined(mixed))

    def _cache_inputs(self, positions: Any) -> tuple[Any, Any, Any]:
        """bool[1, 1, tokens, span]: the columns that a row sees, up to its own; where rows are written; int64[1]: span."""
        ir = self._ir
        int64 = ir.TensorType(ir.DataType.INT64)
        if "write" not in self._shared:
            write = ir.Value(name=WRITE, type=int64, shape=ir.Shape(["batch"]))
            columns = ir.Value(name=COLUMNS, type=int64, shape=ir.Shape([SPAN]))
            self._graph.inputs.extend([write, columns])
            across = self._add("Unsqueeze", [columns, self._ints(0, 1, 2)], dtype=ir.DataType.INT64)
            down = self._add("Unsqueeze", [positions, self._ints(0, 1, 3)], dtype=ir.DataType.INT64)
            mask = self._add("LessOrEqual", [across, down], dtype=ir.DataType.BOOL)
            span = self._add("Shape", [columns], dtype=ir.DataType.INT64)
            self._shared["write"] = (mask, write, span)
        mask, write, span = self._shared["write"]
        return mask, write, span

    def _cache(self, past: Any, kv_heads: int, dim: int) -> Any:
        """The cache in the place of the past rows, under the same name."""
        ir = self._ir
        shape = ir.Shape(["batch", kv_heads, capacity_of(self._spec), dim])
        cache = ir.Value(name=past.name, type=ir.TensorType(self._half), shape=shape)
        self._graph.inputs[next(i for i, value in enumerate(self._graph.inputs) if value is past)] = cache
        return cache

    def _rotation(self, positions: Any, frequencies: Any) -> tuple[Any, Any, Any]:
        """cos and sin of every position, float32[context, head_dim / 2], and positions: int64[batch, tokens]."""
        if frequencies.const_value is None:
            raise GraphError(f"graph {self._spec.name}: the rotary frequencies {frequencies.name} are not a constant")
        values = numpy_of(frequencies)

        def tables() -> tuple[Any, Any]:
            angles = np.arange(capacity_of(self._spec), dtype=np.float32)[:, None] * values[None, :]
            return self._constant("rotary_cos", np.cos(angles)), self._constant("rotary_sin", np.sin(angles))

        def rows() -> Any:
            embeds = self._graph.inputs[0]
            shape = self._add("Shape", [embeds], start=0, end=2, dtype=self._ir.DataType.INT64)
            flat = self._add("Unsqueeze", [positions, self._ints(0)], dtype=self._ir.DataType.INT64)
            return self._add("Expand", [flat, shape], dtype=self._ir.DataType.INT64)

        cos, sin = self._once(("rotary", values.tobytes()), tables)
        return cos, sin, self._once("rows", rows)

    def _split(self, x: Any, heads: int, dim: int) -> Any:
        """[batch, rows, heads * dim] -> [batch, heads, rows, dim]"""
        return self._add("Transpose", [self._add("Reshape", [x, self._ints(0, 0, heads, dim)])], perm=[0, 2, 1, 3])

    def _joined(self, x: Any) -> Any:
        """The inverse of `_split`."""
        return self._add("Reshape", [self._add("Transpose", [x], perm=[0, 2, 1, 3]), self._ints(0, 0, -1)])

    # --- weights --------------------------------------------------------------------------------------------------

    def linears(self) -> None:
        """Give quantized linears the form that TensorRT takes, and count them all."""
        quantized = quantized_linears(self._graph)
        rewritten = {id(found.matmul) for found in quantized}
        for node in self._graph:
            if node.op_type == "MatMul" and id(node) not in rewritten and _is_weight(node.inputs[1]):
                self.lowered.count("float", int(np.prod(_moved(node.inputs[1]).shape.numpy())))
        for found in quantized:
            self._before = found.matmul
            if is_int8(found) and self._has_int8_products:
                self._int8(found)
            elif fits_int4(found):
                self._int4(found)
            else:
                self._float(found)

    def _int4(self, found: QuantizedLinear) -> None:
        ir, name = self._ir, found.values.name
        by_output = [found.inputs // found.block, found.outputs]
        values = self._lazy(f"{name}.int4", [found.inputs, found.outputs], lambda: int4_values(found), ir.DataType.INT4)
        scales = self._lazy(f"{name}.scales", by_output, lambda: int4_scales(found))
        weight = self._add("DequantizeLinear", [values, scales], axis=0, block_size=found.block)
        x, kind = found.matmul.inputs[0], "int4"
        product = self._add("MatMul", [x, weight])
        if int4_of(found)[1].any():
            offsets = self._lazy(f"{name}.offsets", by_output, lambda: int4_offsets(found))
            product = self._add("Add", [product, self._add("MatMul", [self._group_sums(x, found.block), offsets])])
            kind = "int4 with sums of groups"
        self.lowered.count(kind, found.inputs * found.outputs)
        self._swap(found.matmul, product)

    def _group_sums(self, x: Any, block: int) -> Any:
        """The sums of each group of `block` inputs: float32[.., groups], made once for all linears that read x."""

        def sums() -> Any:
            split = self._add("Reshape", [x, self._ints(0, 0, -1, block)])
            wide = self._add("Cast", [split], to=int(self._ir.DataType.FLOAT), dtype=self._ir.DataType.FLOAT)
            return self._add("ReduceSum", [wide, self._ints(-1)], keepdims=0)

        return self._once(("sums", x.name, block), sums)

    def _int8(self, found: QuantizedLinear) -> None:
        name, x = found.values.name, found.matmul.inputs[0]
        values, scales = numpy_of(found.values), numpy_of(found.scale)
        flipped = np.where(scales < 0, -1, 1).astype(np.int8)
        weight = self._add(
            "DequantizeLinear",
            [self._constant(f"{name}.int8", values * flipped), self._constant(f"{name}.scales", np.abs(scales))],
            axis=1,
        )
        if self._ranges is not None:
            if x.name not in self._ranges:
                raise UnsupportedError(
                    f"graph {self._spec.name}: {x.name} has no measured range; build the bundle again"
                )
            widest = max(map(abs, self._ranges[x.name]))
            scale = self._constant(f"{x.name}.scale", np.array((widest or 1.0) / 127, np.float32))
            zero = self._constant("zero_int8", np.array(0, np.int8))
            rounded = self._once(
                ("rounded", x.name),
                lambda: self._add("QuantizeLinear", [x, scale, zero], dtype=self._ir.DataType.INT8),
            )
            x = self._once(("from", x.name), lambda: self._add("DequantizeLinear", [rounded, scale, zero]))
        self.lowered.count("int8", found.inputs * found.outputs)
        self._swap(found.matmul, self._add("MatMul", [x, weight]))

    def _float(self, found: QuantizedLinear) -> None:
        weight = self._lazy(f"{found.values.name}.float", [found.inputs, found.outputs], lambda: as_float(found))
        self.lowered.count(f"{found.bits} bits as floats", found.inputs * found.outputs)
        self._swap(found.matmul, self._add("MatMul", [found.matmul.inputs[0], weight]))

    # --- types ----------------------------------------------------------------------------------------------------

    def types(self) -> None:
        """Decide what each operator computes in, and cast where its inputs are something else."""
        ir = self._ir
        float32, floats = ir.DataType.FLOAT, (ir.DataType.FLOAT, self._half)
        for node in list(self._graph):
            self._before = node
            if node.op_type in KEPT:
                continue
            read = [v for v in node.inputs if v is not None and v.dtype in floats]
            computed = [v for v in read if not _is_weight(v)]
            if not read:
                continue
            if node.op_type in IN_FLOAT32:
                kind = float32
            elif node.op_type in IN_HALF:
                kind = self._half
            else:
                kind = float32 if not computed or any(v.dtype == float32 for v in computed) else self._half
            for i, value in enumerate(node.inputs):
                if value is not None and value.dtype in floats and value.dtype != kind:
                    node.replace_input_with(i, self._in(value, kind))
            for output in node.outputs:
                if node.op_type != "QuantizeLinear" and output.dtype in (None, *floats):
                    output.type = ir.TensorType(kind)
        presents = {present_name(pair.input) for pair in self._spec.states}
        for i, output in enumerate(list(self._graph.outputs)):
            if output.dtype != float32 and output.name not in presents:
                name, producer = output.name, output.producer()
                output.name = f"{name}.half"
                cast = ir.Node("", "Cast", [output], [ir.AttrInt64("to", int(float32))], num_outputs=1)
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(float32), output.shape
                self._graph.insert_after(producer, cast)
                self._graph.outputs[i] = cast.outputs[0]
                cast.outputs[0].name = name

    def _in(self, value: Any, kind: Any) -> Any:
        """`value` in the float type `kind`: a constant's twin, what moves one's twin, or a cast."""
        return self._once(("in", value.name, int(kind)), lambda: self._twin(value, kind))

    def _twin(self, value: Any, kind: Any) -> Any:
        ir, producer = self._ir, value.producer()
        if value.is_initializer():
            tensor = value.const_value
            lazy = ir.LazyTensor(
                lambda: ir.Tensor(converted(tensor.numpy(), kind.numpy(), value.name)), kind, tensor.shape
            )
            return self._register(f"{value.name}.{kind.name.lower()}", lazy)
        if producer is not None and _is_weight(value):
            inputs = [self._in(v, kind) if v is not None and v.dtype == value.dtype else v for v in producer.inputs]
            copy = ir.Node("", producer.op_type, inputs, list(producer.attributes.values()), num_outputs=1)
            copy.outputs[0].type, copy.outputs[0].shape = ir.TensorType(kind), value.shape
            self._graph.insert_before(self._before, copy)
            return copy.outputs[0]
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(kind))], num_outputs=1)
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(kind), value.shape
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(producer, cast)
        return cast.outputs[0]

    # --- building -------------------------------------------------------------------------------------------------

    def _add(self, kind: str, inputs: Sequence[Any], dtype: Any = None, **attributes: Any) -> Any:
        """The output of a new node in front of the one that is being replaced; of the type of its first input unless given."""
        ir = self._ir
        made = ir.Node("", kind, list(inputs), [_attribute(ir, n, v) for n, v in attributes.items()], num_outputs=1)
        output = made.outputs[0]
        first = inputs[0].dtype
        is_quantized = kind == "DequantizeLinear"
        dtype = dtype if dtype is not None else ir.DataType.FLOAT if is_quantized else first
        if dtype is not None:
            output.type = ir.TensorType(dtype)
        self._graph.insert_before(self._before, made)
        return output

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _ints(self, *values: int) -> Any:
        return self._constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def _constant(self, name: str, array: Array, dtype: Any = None) -> Any:
        """An initializer; the same one for the same name."""
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        return self._register(name, self._ir.Tensor(array, dtype=dtype, name=name))

    def _lazy(self, name: str, shape: list[int], make: Callable[[], Array], dtype: Any = None) -> Any:
        """An initializer of float32, unless another type is given, that is made when it is asked for."""
        ir = self._ir
        kind = ir.DataType.FLOAT if dtype is None else dtype
        return self._register(name, ir.LazyTensor(lambda: ir.Tensor(make(), dtype=kind), kind, ir.Shape(shape)))

    def _register(self, name: str, tensor: Any) -> Any:
        ir = self._ir
        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _swap(self, old: Any, new: Any) -> None:
        """Let `new` take the place, the name and the readers of the first output of `old`."""
        before = old.outputs[0]
        new.shape = before.shape
        if before.is_graph_output():
            index = next(i for i, value in enumerate(self._graph.outputs) if value is before)
            self._graph.outputs[index] = new
        name = before.name
        before.replace_all_uses_with(new)
        self._graph.remove(old, safe=True)
        new.name = name


def _is_weight(value: Any) -> bool:
    """Whether `value` is a constant of the file, moved at most."""
    if value.is_initializer():
        return True
    producer = value.producer()
    return producer is not None and producer.op_type in MOVES and all(map(_is_weight, producer.inputs))


def _moved(value: Any) -> Any:
    """The constant of the file that `_is_weight` found behind `value`."""
    while not value.is_initializer():
        value = value.producer().inputs[0]
    return value


def _attribute(ir: Any, name: str, value: Any) -> Any:
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, list):
        return ir.AttrInt64s(name, value)
    return ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
