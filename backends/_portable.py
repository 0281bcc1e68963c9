"""A portable graph: the file it lies in, and the quantized linears in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ExecutionError, GraphError


def model_of(path: Path) -> Any:
    """The `onnx_ir.Model` of a file; weights are read when they are asked for. Raises ExecutionError if it is none."""
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as error:  # protobuf's own, and whatever a damaged file makes of the reader
        reason = " ".join(str(error).split())[:200]
        raise ExecutionError(f"{path}: cannot be read as ONNX: {reason}; export it again") from error


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear as `lensc.export.quantize.linears` writes it: MatMul(x, [Transpose] DequantizeLinear(values, scale, zero)).

    `block`: the inputs that share a scale, 0 for all; `turned`: its values lie [inputs, outputs].
    """

    matmul: Any
    values: Any
    scale: Any
    zero_point: Any | None
    block: int
    turned: bool
    inputs: int
    outputs: int

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return int(self.values.dtype.bitwidth)


def quantized_linears(graph: Any) -> list[QuantizedLinear]:
    """Those of an `onnx_ir` graph, in its order. Raises GraphError for a weight that lies as none is written."""
    found = []
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        source, turns = node.inputs[1].producer(), 0
        while source is not None and source.op_type == "Transpose":
            source, turns = source.inputs[0].producer(), turns + 1
        if source is None or source.op_type != "DequantizeLinear":
            continue
        values, scale, *rest = source.inputs
        sizes = [int(d) for d in values.shape.numpy()]
        block = source.attributes["block_size"].as_int() if "block_size" in source.attributes else 0
        turned = source.attributes["axis"].as_int() == 1 and not block
        if turns != (0 if turned else 1):
            raise GraphError(f"weight {values.name}: turned {turns} times before its product; export it again")
        inputs, outputs = sizes if turned else sizes[::-1]
        zero_point = rest[0] if rest else None
        found.append(QuantizedLinear(node, values, scale, zero_point, block, turned, inputs, outputs))
    return found
