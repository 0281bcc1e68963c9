"""Quantized linears of a portable graph -> ONNX Runtime's operators.

    groups along the inputs, at most 8 bits         MatMulNBits: weights stay packed, and lie in the file as they are;
                                                    one for query, key and value where theirs lie together
    int8, a scale per output, activations of 8 bits MatMulIntegerToFloat on inputs quantized once per tensor

What the CPU kernels of ONNX Runtime 1.32 cannot take is a reason, not a slow path.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._portable import QuantizedLinear, quantized_linears
from .errors import GraphError

CONTRIB = "com.microsoft"
INT8_PRODUCTS = 4
"""accuracy_level: inputs are quantized to int8 per block, products are int8, sums int32."""
FLOAT_PRODUCTS = 1


def lower_linears(ir: Any, graph: Any, activation_bits: int) -> None:
    """Rewrite every quantized linear of `graph`. Raises GraphError for one that no kernel takes."""
    for found in quantized_linears(graph):
        if found.turned and activation_bits == 8:
            _to_integer_product(ir, graph, found)
        elif found.block:
            _to_matmul_nbits(ir, graph, found, activation_bits)
        else:
            raise GraphError(
                f"weight {found.values.name}: a scale per output with float activations has no kernel in onnxruntime; "
                "the nearest are groups (w8-g128) or activations of 8 bits"
            )


def join_attention_inputs(ir: Any, graph: Any) -> None:
    """One MatMulNBits in the place of the three that make query, key and value, where nobody else reads those and their
    bytes follow each other in the file. Inputs are quantized once, not three times, and threads meet once.
    """
    for attention in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        made = attention.inputs[:3]
        products = [value.producer() for value in made]
        if any(node is None or node.op_type != "MatMulNBits" or len(node.outputs[0].uses()) != 1 for node in products):
            continue
        first = products[0]
        settings = [{name: a.value for name, a in node.attributes.items() if name != "N"} for node in products]
        if any(node.inputs[0] is not first.inputs[0] for node in products) or settings != settings[:1] * 3:
            continue
        parts = list(zip(*(node.inputs[1:] for node in products), strict=False))
        if len({len(node.inputs) for node in products}) > 1 or not all(_are_adjacent(ir, values) for values in parts):
            continue
        joined = [_joined(ir, graph, values) for values in parts]
        outputs = sum(node.attributes["N"].as_int() for node in products)
        attributes = [ir.AttrInt64(name, value) for name, value in {**settings[0], "N": outputs}.items()]
        product = ir.Node(CONTRIB, "MatMulNBits", [first.inputs[0], *joined], attributes, num_outputs=1)
        graph.insert_before(first, product)
        shape = [*first.outputs[0].shape][:-1] if first.outputs[0].shape is not None else None
        product.outputs[0].type = first.outputs[0].type
        product.outputs[0].shape = None if shape is None else ir.Shape([*shape, outputs])
        for i, value in enumerate((product.outputs[0], None, None)):
            attention.replace_input_with(i, value)
        graph.remove(products, safe=True)


def _are_adjacent(ir: Any, values: Sequence[Any]) -> bool:
    """Whether the bytes of initializers follow each other in one file."""
    tensors = [value.const_value for value in values]
    return all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors) and all(
        (b.path, b.offset) == (a.path, a.offset + a.length) for a, b in itertools.pairwise(tensors)
    )


def _joined(ir: Any, graph: Any, values: Sequence[Any]) -> Any:
    """An initializer with the rows of `values`, whose bytes follow each other."""
    first, tensors = values[0].const_value, [value.const_value for value in values]
    rows = sum(int(tensor.shape[0]) for tensor in tensors)
    whole = ir.ExternalTensor(
        first.location, first.offset, sum(tensor.length for tensor in tensors), first.dtype,
        shape=ir.Shape([rows, *first.shape.numpy()[1:]]), name=f"{values[0].name}.joined", base_dir=first.base_dir,
    )  # fmt: skip
    return _register(ir, graph, whole)


def _to_matmul_nbits(ir: Any, graph: Any, found: QuantizedLinear, activation_bits: int) -> None:
    name, block = found.values.name, found.block
    if block & (block - 1) or block < 16:
        raise GraphError(f"weight {name}: groups of {block}; onnxruntime takes powers of two from 16, e.g. 32 or 128")
    dtype = found.values.dtype
    bits = dtype.bitwidth
    blocks = -(-found.inputs // block)
    shape = (found.outputs, blocks, block * bits // 8)
    if found.inputs % block or dtype == ir.DataType.INT8:
        values = _computed(ir, graph, name + ".blocks", np.uint8, shape, lambda: _blocks(ir, found, bits, blocks))
    else:
        values = _reshaped(ir, graph, found.values, name + ".blocks", ir.DataType.UINT8, shape)
    inputs = [found.matmul.inputs[0], values, found.scale]
    if found.zero_point is not None and (bits == 8 or not _is_default(found.zero_point, bits)):
        row_bytes = -(-blocks * bits // 8)
        shape_zeros = (found.outputs, row_bytes)
        if blocks * bits % 8:
            count = 8 * row_bytes // bits
            zeros = _computed(ir, graph, name + ".zeros", np.uint8, shape_zeros, lambda: _zero_rows(ir, found, count))
        else:
            zeros = _reshaped(ir, graph, found.zero_point, name + ".zeros", ir.DataType.UINT8, shape_zeros)
        inputs.append(zeros)
    level = INT8_PRODUCTS if activation_bits == 8 else FLOAT_PRODUCTS
    attributes = {"K": found.inputs, "N": found.outputs, "bits": bits, "block_size": block, "accuracy_level": level}
    made = [ir.AttrInt64(key, value) for key, value in attributes.items()]
    _replace(graph, found.matmul, ir.Node(CONTRIB, "MatMulNBits", inputs, made, num_outputs=1))


def _to_integer_product(ir: Any, graph: Any, found: QuantizedLinear) -> None:
    """The bias that follows goes into the operator."""
    x = found.matmul.inputs[0]
    quantize = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
    graph.insert_before(found.matmul, quantize)
    whole, step, zero = quantize.outputs
    inputs = [whole, found.values, step, found.scale, zero, None]
    end, bias = _bias_after(found)
    if bias is not None:
        inputs.append(bias)
    product = ir.Node(CONTRIB, "MatMulIntegerToFloat", inputs, num_outputs=1)
    if end is not found.matmul:
        product.outputs[0].type, product.outputs[0].shape = end.outputs[0].type, end.outputs[0].shape
        graph.insert_before(found.matmul, product)
        end.outputs[0].replace_all_uses_with(product.outputs[0])
        graph.remove([end, found.matmul], safe=True)
    else:
        _replace(graph, found.matmul, product)


def _bias_after(found: QuantizedLinear) -> tuple[Any, Any | None]:
    """The Add of a bias that is the only reader of the product, and the bias."""
    output = found.matmul.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and not output.is_graph_output() and uses[0].node.op_type == "Add":
        add = uses[0].node
        for value in () if add.outputs[0].is_graph_output() else add.inputs:
            if value.is_initializer() and value.shape is not None and list(value.shape.numpy()) == [found.outputs]:
                return add, value
    return found.matmul, None


def _blocks(ir: Any, found: QuantizedLinear, bits: int, blocks: int) -> np.typing.NDArray[np.uint8]:
    """The values unsigned, padded to whole blocks, packed: uint8[outputs, blocks, block * bits / 8]."""
    stored = found.values.const_value.numpy()
    if bits == 8:
        values = stored if stored.dtype == np.uint8 else (stored.view(np.uint8) ^ np.uint8(128))
    else:
        values = stored.astype(np.uint8)
    padded = np.zeros((found.outputs, blocks * found.block), np.uint8)
    padded[:, : found.inputs] = values
    # int8 has become unsigned
    dtype = ir.DataType.UINT8 if bits == 8 else found.values.dtype
    return _packed(ir, padded, dtype).reshape(found.outputs, blocks, -1)


def _zero_rows(ir: Any, found: QuantizedLinear, count: int) -> np.typing.NDArray[np.uint8]:
    """The zero points, each row padded to `count`, which fill whole bytes."""
    assert found.zero_point is not None
    stored = found.zero_point.const_value.numpy().astype(np.uint8)
    zeros = np.zeros((found.outputs, count), np.uint8)
    zeros[:, : stored.shape[1]] = stored
    return _packed(ir, zeros, found.zero_point.dtype).reshape(found.outputs, -1)


def _packed(ir: Any, values: np.typing.NDArray[np.uint8], dtype: Any) -> np.typing.NDArray[np.uint8]:
    """The bytes of `values`, one to a byte, as a tensor of `dtype` has them, whose rows fill whole bytes."""
    return np.frombuffer(ir.Tensor(values, dtype=dtype).tobytes(), np.uint8)


def _is_default(zero_point: Any, bits: int) -> bool:
    """Whether all zero points are what the operator takes without any."""
    return bool((zero_point.const_value.numpy().astype(np.uint8) == 2 ** (bits - 1)).all())


def _reshaped(ir: Any, graph: Any, value: Any, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
    """The same bytes of the same file under another name, type and shape."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        same = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, dtype, shape=ir.Shape(shape), name=name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        same = ir.Tensor(np.frombuffer(tensor.tobytes(), dtype.numpy()).reshape(shape), name=name)
    return _register(ir, graph, same)


def _computed(ir: Any, graph: Any, name: str, dtype: Any, shape: tuple[int, ...], make: Callable[[], Any]) -> Any:
    """An initializer whose bytes are made when they are written."""
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    lazy = ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(make()), name=name), kind, ir.Shape(shape), name=name)
    return _register(ir, graph, lazy)


def _register(ir: Any, graph: Any, tensor: Any) -> Any:
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: Any, old: Any, new: Any) -> None:
    graph.insert_before(old, new)
    before, after = old.outputs[0], new.outputs[0]
    after.type, after.shape = before.type, before.shape
    if before.is_graph_output():
        index = next(i for i, value in enumerate(graph.outputs) if value is before)
        after.name = before.name
        graph.outputs[index] = after
    before.replace_all_uses_with(after)
    graph.remove(old, safe=True)
