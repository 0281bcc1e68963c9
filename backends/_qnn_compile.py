"""A portable graph on its way to a context binary: lowered, quantized, handed to Qualcomm's compiler in a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lensc.export.graph import Graph
from lensc.export.quantize.scheme import Scheme

from ._qnn_child import PROVIDER, Child
from ._qnn_chip import Chip
from ._qnn_lower import lower, patches_of
from ._qnn_quantize import quantize
from ._qnn_ranges import load_ranges
from .errors import ExecutionError, UnsupportedError

REFUSED = re.compile(r"\{ name: (?P<name>[^,]*), type: (?P<type>[^ }]*) \}")
"""As the provider lists the nodes it does not take."""

HINTS = {
    "Reshape": "at most 5 dimensions",
    "Transpose": "at most 5 dimensions",
    "DequantizeLinear": "int8 with a scale per output, or int4 in groups",
}
"""What to change, by operator."""

SHOWN = 8
"""Nodes named in an error."""

LIMIT_S = 3600.0
"""A compiler that takes longer hangs: a full-size tower takes one to two minutes."""


@dataclass(frozen=True)
class Compiled:
    """What each node is and where it went, how many went where, and the compiler's peak memory."""

    where: dict[str, list[str]]
    counts: dict[str, int]
    peak_bytes: int


def write_fixed(graph: Graph, path: Path, made_for: Chip | None) -> int:
    """Write `graph` at fixed shapes as ONNX to `path`, with its weights in a file beside it; return the multiply-adds.

    A graph of a quantized scheme becomes one of integers as the chip takes them, for which it needs ranges; without a chip
    activations stay in float. Raises GraphError, ExecutionError, UnsupportedError.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    model = lower(graph, patches_of(graph.spec))
    ShapeInferencePass()(model)
    products = sum(
        int(np.prod(node.outputs[0].shape.numpy())) * int(node.inputs[0].shape.numpy()[-1])
        for node in model.graph
        if node.op_type == "MatMul"
    )
    scheme = Scheme.parse(graph.scheme)
    if made_for is not None and not scheme.weights_are_float:
        if graph.ranges is None:
            raise UnsupportedError(f"graph {graph.spec.name}: scheme {graph.scheme} needs ranges of its activations")
        quantize(model, load_ranges(graph.ranges), scheme.activation_bits, made_for.htp_arch)
    ir.save(model, path, external_data=f"{path.name}.data")
    return products


def compile_context(source: Path, out: Path, provider: Mapping[str, str], allowed: Collection[str]) -> Compiled:
    """Compile the fixed graph `source` into the context binary of the ONNX file `out`.

    Raises UnsupportedError that names what the NPU does not take and is not `allowed` on the CPU, ExecutionError for a
    compiler that fails, crashes or hangs.
    """
    job = {"source": str(source), "out": str(out), "provider": dict(provider), "cpu_nodes": sorted(allowed)}
    with Child(f"{source.name}", "compile", job, LIMIT_S) as child:
        try:
            answer = child.ask({})
        except ExecutionError as error:
            refused = _refused(source, child.log())
            if refused:
                raise UnsupportedError(f"{len(refused)} nodes are not for the NPU: {_shown(refused)}") from error
            raise ExecutionError(f"{error}: {child.last_words()}" if child.log().strip() else str(error)) from error
    report = json.loads(str(answer["report"]))
    where: dict[str, list[str]] = report["where"]
    elsewhere = {name for name, (_, at) in where.items() if at != PROVIDER}
    strangers = sorted(elsewhere - set(allowed))
    if strangers:
        nodes = _nodes(source)
        raise UnsupportedError(
            f"{len(strangers)} nodes would run on the CPU: {_shown([nodes.get(n, n) for n in strangers])}; "
            "only those that are allowed by name may (--allow-cpu NODE)"
        )
    return Compiled(where, dict(report["counts"]), int(answer["peak_bytes"]))


def _refused(source: Path, log: str) -> list[str]:
    """The nodes that the provider says it does not take, described."""
    nodes = _nodes(source)
    names = dict.fromkeys(match["name"] for match in REFUSED.finditer(log))
    return [nodes.get(name, name) for name in names]


def _nodes(source: Path) -> dict[str, str]:
    """What each node is: name, operator, the shape of its output, and what to change."""
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    described = {}
    for node in graph.node:
        hint = f", expected: {HINTS[node.op_type]}" if node.op_type in HINTS else ""
        described[node.name] = f"{node.name} ({node.op_type} {shapes.get(node.output[0], '')}{hint})"
    return described


def _shown(items: Sequence[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
