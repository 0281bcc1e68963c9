"""In which range each activation of a graph lies, measured on real inputs, a few nodes at a time.

All activations of a full-size tower for one slice are 17 GB; a layer's are 0.5 GB. So the graph is cut into pieces that are
run one after the other, each over all samples, and only what later pieces read is kept in between.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec

from .base import Array
from .errors import ExecutionError

PIECE = 16
"""Nodes of a piece."""


def measure(
    path: Path, samples: Sequence[Mapping[str, Array]], threads: int, keep: Collection[str] = ()
) -> tuple[dict[str, tuple[float, float]], list[dict[str, Array]]]:
    """(smallest, largest) of every float value of the ONNX file `path` over all `samples`, feeds of its inputs; and for each
    sample those of its outputs that are to be kept.

    Pieces of the graph are written beside it for as long as they run. Raises ExecutionError for values that are not finite.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    held: list[dict[str, Array]] = [dict(sample) for sample in samples]
    ranges: dict[str, tuple[float, float]] = {}
    for sample in held:
        _widen(ranges, sample)
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    pieces = list(_pieces(list(graph.node)))
    for i, nodes in enumerate(pieces):
        later = {*keep} | {name for piece in pieces[i + 1 :] for node in piece for name in node.input}
        made = [name for node in nodes for name in node.output]
        inside = set(made)
        wanted = [name for node in nodes if node.op_type != "DequantizeLinear" for name in node.output]
        read = list(dict.fromkeys(n for node in nodes for n in node.input if n and n not in inside))
        fed = [name for name in read if name not in initializers]
        piece = onnx.helper.make_graph(
            nodes,
            "piece",
            [types[name] for name in fed],
            [onnx.helper.make_empty_tensor_value_info(name) for name in wanted],
            [initializers[name] for name in read if name in initializers],
        )
        session = _session(onnx, model, piece, path, threads)
        kinds: dict[str, Any] = {}
        for sample in held:
            outputs = dict(zip(wanted, session.run(wanted, {name: sample[name] for name in fed}), strict=True))
            _widen(ranges, outputs)
            kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in outputs.items()}
            sample.update({name: array for name, array in outputs.items() if name in later})
            for name in [name for name in sample if name not in later]:
                del sample[name]
        for name in wanted:
            types[name] = onnx.helper.make_tensor_value_info(name, kinds[name], None)
    broken = [name for name, (low, high) in ranges.items() if not np.isfinite([low, high]).all()]
    if broken:
        raise ExecutionError(f"{path}: {broken[0]} is not finite on a calibration picture; export the checkpoint again")
    return ranges, held


def outputs_of(spec: GraphSpec) -> list[str]:
    """The outputs of a graph that are worth keeping: rows of a KV cache are 4 MB a layer and prompt."""
    return [t.name for t in spec.outputs if t.name not in {pair.output for pair in spec.states}]


def _pieces(nodes: list[Any]) -> Iterator[list[Any]]:
    """`nodes` in their order, cut where no weight stands between its DequantizeLinear and its product."""
    piece: list[Any] = []
    for node in nodes:
        if len(piece) >= PIECE and piece[-1].op_type != "DequantizeLinear":
            yield piece
            piece = []
        piece.append(node)
    if piece:
        yield piece


def _widen(ranges: dict[str, tuple[float, float]], arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        if array.dtype == np.float32:
            low, high = float(array.min()), float(array.max())
            if name in ranges:
                low, high = min(low, ranges[name][0]), max(high, ranges[name][1])
            ranges[name] = (low, high)


def _session(onnx: Any, model: Any, piece: Any, path: Path, threads: int) -> Any:
    import onnxruntime as ort

    made = onnx.helper.make_model(piece, opset_imports=model.opset_import, ir_version=model.ir_version)
    file = path.with_name(f"{path.stem}.piece.onnx")
    file.write_bytes(made.SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    # optimized, the engine would round the inputs of quantized weights to 8 bits
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    finally:
        file.unlink()


def save_ranges(ranges: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Write ranges as JSON: a value's name, its smallest and its largest."""
    path.write_text(json.dumps(dict(sorted(ranges.items())), indent=0), encoding="utf-8")


def load_ranges(path: Path) -> dict[str, tuple[float, float]]:
    """Read them. Raises ExecutionError for a file that is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {name: (float(low), float(high)) for name, (low, high) in document.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExecutionError(f"{path}: no ranges of activations: {error}; calibrate again") from error
