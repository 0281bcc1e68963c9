"""A portable graph on its way to a context binary: lowered, quantized, handed to Qualcomm's compiler in a process of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import Graph
from lensc.export.quantize.scheme import Scheme

from ._qnn_child import PROVIDER, Child
from ._qnn_chip import Chip
from ._qnn_decoder import DecoderLayout
from ._qnn_form import Form, forms
from ._qnn_lower import lower, rotary_of
from ._qnn_quantize import quantize
from ._qnn_split import PART_BYTES, split
from ._ranges import load_ranges
from .errors import ExecutionError, UnsupportedError

REFUSED = re.compile(r"\{ name: (?P<name>[^,]*), type: (?P<type>[^ }]*) \}")
"""As the provider lists the nodes it does not take."""

HINTS = {
    "Reshape": "at most 5 dimensions",
    "Transpose": "at most 5 dimensions",
    "DequantizeLinear": "int8 with a scale per output, or int4 in groups",
}
"""What to change, by operator."""

ENTRY = "inputs_embeds"
NAMES = ("prefill", "decode")

SHOWN = 8
"""Nodes named in an error."""

LIMIT_S = 3600.0
"""A compiler that takes longer hangs: a full-size tower takes one to two minutes."""


@dataclass(frozen=True)
class Fixed:
    """A graph at fixed shapes, an `onnx_ir.Model`, its multiply-adds, and the scales of its states where they are integers."""

    model: Any
    multiply_adds: int
    scales: dict[str, float]


@dataclass(frozen=True)
class Compiled:
    """What each node is and where it went, and the compiler's peak memory."""

    where: dict[str, list[str]]
    peak_bytes: int

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes went where."""
        return dict(Counter(at for _, at in self.where.values()))


def fix(graph: Graph, form: Form, made_for: Chip | None) -> Fixed:
    """`graph` in the sizes of `form`; weights are read when they are written.

    A graph of a quantized scheme becomes one of integers as the chip takes them, for which it needs ranges; without a chip
    activations stay in float. Raises GraphError, ExecutionError, UnsupportedError.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    model = lower(graph, form)
    ShapeInferencePass()(model)
    products = sum(
        int(np.prod(node.outputs[0].shape.numpy())) * int(node.inputs[0].shape.numpy()[-1])
        for node in model.graph
        if node.op_type == "MatMul"
    )
    scheme = Scheme.parse(graph.scheme)
    scales: dict[str, float] = {}
    if made_for is not None and not scheme.weights_are_float:
        if graph.ranges is None:
            raise UnsupportedError(f"graph {graph.spec.name}: scheme {graph.scheme} needs ranges of its activations")
        scales = quantize(model, load_ranges(graph.ranges), scheme.activation_bits, made_for.htp_arch)
    return Fixed(model, products, scales)


def save(model: Any, path: Path) -> Path:
    """Write an `onnx_ir.Model` as ONNX to `path`, with its weights in a file beside it."""
    import onnx_ir as ir

    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def compile_decoder(
    graph: Graph, made_for: Chip, provider: Mapping[str, str], out: Path, slug: str, emulated_products: float
) -> tuple[Compiled, DecoderLayout, int]:
    """Compile a decoder part by part into the folder `out`: prefill and decode in one binary, which share weights.

    A host that emulates crashes on such a binary, so each form gets one of its own, too, where a prefill has at most
    `emulated_products` multiply-adds. Returns what went where, the layout, and the multiply-adds of a prefill.
    """
    many, one = forms(graph.spec, graph.context)
    prefill, decode = fix(graph, many, made_for), fix(graph, one, made_for)
    emulates = prefill.multiply_adds <= emulated_products
    parts, emulated = [], []
    where: dict[str, list[str]] = {}
    peak_bytes = 0
    models = (split(fixed.model, ENTRY, PART_BYTES) for fixed in (prefill, decode))
    for k, pair in enumerate(zip(*models, strict=True)):
        folder = out / "fixed"
        folder.mkdir()
        sources = [save(model, folder / f"{name}.{k}.onnx") for name, model in zip(NAMES, pair, strict=True)]
        names = [f"{slug}.{source.name}" for source in sources]
        jobs = [(sources, names)]
        parts.append((names[0], names[1]))
        if emulates:
            alone = [f"{slug}.emulated.{source.name}" for source in sources]
            jobs += [([source], [name]) for source, name in zip(sources, alone, strict=True)]
            emulated.append((alone[0], alone[1]))
        for wanted, made in jobs:
            compiled = compile_context(wanted, [out / name for name in made], provider, graph.cpu_nodes)
            peak_bytes = max(peak_bytes, compiled.peak_bytes)
            where |= compiled.where if wanted is sources else {}
        shutil.rmtree(folder)
    groups, frequencies = rotary_of(graph)
    layout = DecoderLayout(
        context=many.sizes["past"],
        tokens=many.sizes["tokens"],
        rows=many.sizes["rows"],
        groups=groups,
        inverse_frequencies=tuple(float(f) for f in frequencies),
        scales=prefill.scales,
        parts=tuple(parts),
        emulated=tuple(emulated),
    )
    return Compiled(where, peak_bytes), layout, prefill.multiply_adds


def compile_context(
    sources: Sequence[Path], outs: Sequence[Path], provider: Mapping[str, str], allowed: Collection[str]
) -> Compiled:
    """Compile fixed graphs into the context binary of the ONNX files `outs`; several share their weights in one.

    Raises UnsupportedError that names what the NPU does not take and is not `allowed` on the CPU, ExecutionError for a
    compiler that fails, crashes or hangs.
    """
    job = {
        "sources": [str(source) for source in sources],
        "outs": [str(out) for out in outs],
        "provider": dict(provider),
        "cpu_nodes": sorted(allowed),
    }
    with Child(" and ".join(source.name for source in sources), "compile", job, LIMIT_S) as child:
        try:
            answer = child.ask({})
        except ExecutionError as error:
            refused = _refused(sources, child.log())
            if refused:
                raise UnsupportedError(f"{len(refused)} nodes are not for the NPU: {_shown(refused)}") from error
            raise ExecutionError(f"{error}: {child.last_words()}" if child.log().strip() else str(error)) from error
    placed: list[dict[str, list[str]]] = json.loads(str(answer["where"]))
    for source, nodes in zip(sources, placed, strict=True):
        strangers = sorted(name for name, (_, at) in nodes.items() if at != PROVIDER and name not in allowed)
        if strangers:
            known = _nodes(source)
            raise UnsupportedError(
                f"{len(strangers)} nodes would run on the CPU: {_shown([known.get(n, n) for n in strangers])}; "
                "only those that are allowed by name may (--allow-cpu NODE)"
            )
    if len(sources) == 1:
        [where] = placed
    else:
        where = {f"{s.stem}/{n}": at for s, nodes in zip(sources, placed, strict=True) for n, at in nodes.items()}
    return Compiled(where, int(answer["peak_bytes"]))


def _refused(sources: Sequence[Path], log: str) -> list[str]:
    """The nodes that the provider says it does not take, described."""
    nodes = {name: text for source in sources for name, text in _nodes(source).items()}
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
