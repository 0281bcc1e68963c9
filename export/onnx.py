"""torch module -> portable ONNX graph.

The graph is traced with parameters that have no values (torch's meta device), so nothing in it depends on a weight,
and the weights are streamed into the file afterwards, one at a time, by name. Names are the contract: a parameter is an
initializer under its key in `module.state_dict()`, in its own shape and untransposed, which for the model's graphs
(`models.session.graph_modules`) is the checkpoint's key, e.g. `llm.model.layers.0.mlp.down_proj.weight`. Whatever else
is an initializer is a small constant `const_<i>`.

Norms and attention are calls of the functions in `lensc.export.functions`, whose definitions the file carries.

The file holds no path, no stack trace and no version, and two exports of the same weights have the same bytes.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from lensc.backends.errors import GraphError

from .functions import DOMAIN, VERSION, functions
from .graph import Graph, GraphSpec, TensorSpec
from .models.minicpmv import MiniCPMV
from .models.session import graph_modules
from .passes import all_values, simplify
from .writer import Parameter, Rows, write_graph

OPSET = 21
"""Opset 20 brought Gelu, 21 block-wise DequantizeLinear (int4 weights), which ONNX Runtime, its QNN provider and
OpenVINO all read. From 23 on RMSNorm, rotary embedding and attention are single operators, which QNN does not take."""

THIRDS = "qkv"
"""The parts of a packed in-projection, in the order of its rows."""


def export_model(model: MiniCPMV, folder: Path, rows: Rows | None = None) -> dict[str, Graph]:
    """Write `vision.onnx` and `decoder.onnx` with their data files into the existing `folder`; return both graphs.

    With `rows` the model may lie on the meta device; without, its own parameters are written.
    """
    return {
        name: export_graph(module, example_inputs(spec), spec, folder / f"{name}.onnx", rows)
        for name, (module, spec) in graph_modules(model).items()
    }


def export_graph(
    module: nn.Module, example: Sequence[Tensor], spec: GraphSpec, path: Path, rows: Rows | None = None
) -> Graph:
    """Trace `module` and write it to `path`, with its weights in one file beside it, in float32.

    Raises what `trace_graph` and `write_graph` do.
    """
    state = dict(module.state_dict())
    if rows is None and any(p.device.type == "meta" for p in state.values()):
        raise GraphError(f"graph {spec.name}: the module lies on the meta device and has no values; pass `rows`")
    model, parameters = trace_graph(module, example, spec)
    read = rows or (lambda name, start, stop: state[name][start:stop])
    return Graph(spec, path, "f32", write_graph(model, path, parameters, read))


def trace_graph(module: nn.Module, example: Sequence[Tensor], spec: GraphSpec) -> tuple[ir.Model, dict[str, Parameter]]:
    """The graph of `module`, and where the rows of each initializer without values come from.

    `module` takes and returns tensors in the order of `spec`, and makes tensors of its own on its inputs' device;
    `example` are inputs of any value and of sizes that differ from each other and from 1. Raises GraphError if the
    traced graph is not the one `spec` describes.
    """
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    model = _trace(module, example, spec)
    simplify(model, frozenset(shapes))
    parameters = {name: Parameter(name, shape) for name, shape in shapes.items()}
    parameters |= _split_parameters(model, shapes)
    _forget_builder(model)
    _name_dimensions(model, spec)
    _check_signature(model, spec)
    used = [name for name in model.graph.initializers if name in parameters]
    return model, {name: parameters[name] for name in used}


def _split_parameters(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
    """Make a parameter that is cut along its rows into three (`in_proj_weight`) three initializers `.q`, `.k`, `.v`."""
    found: dict[str, Parameter] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Split" else None
        if source is None or source.name is None or source.name not in shapes or len(node.outputs) != len(THIRDS):
            continue
        base, shape = source.name, shapes[source.name]
        part = (shape[0] // len(THIRDS), *shape[1:])
        for i, (third, output) in enumerate(zip(THIRDS, node.outputs, strict=True)):
            name = f"{base}.{third}"
            value = ir.Value(name=name, type=source.type, shape=ir.Shape(part), const_value=_meta(name, part))
            found[name] = Parameter(base, part, i * part[0])
            output.replace_all_uses_with(value)
            model.graph.register_initializer(value)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[base]
    return found


def _meta(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """A tensor without values, as the exporter makes them of a module on the meta device."""
    return TorchTensor(torch.empty(shape, device="meta"), name=name)


def example_inputs(spec: GraphSpec) -> tuple[Tensor, ...]:
    """Zeros for every input of `spec`, without memory, each symbolic dimension of its own small size."""
    primes = (3, 5, 7, 11, 13, 17, 19, 23)
    sizes = {name: min(prime, size.max) for prime, (name, size) in zip(primes, spec.dims.items(), strict=False)}
    return tuple(
        torch.zeros(
            [d if isinstance(d, int) else sizes[d] for d in t.shape], dtype=getattr(torch, t.dtype), device="meta"
        )
        for t in spec.inputs
    )


def _trace(module: nn.Module, example: Sequence[Tensor], spec: GraphSpec) -> ir.Model:
    dims = {name: torch.export.Dim(name, min=size.min, max=size.max) for name, size in spec.dims.items()}
    dynamic = [{i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in spec.inputs]
    with _quiet_exporter():
        program = torch.export.export(
            _without_values(module),
            tuple(x.to("meta") for x in example),
            dynamic_shapes=_by_parameter(module, dynamic),
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    if exported is None:
        raise GraphError(f"graph {spec.name}: torch.onnx.export returned nothing")
    model = exported.model
    model.opset_imports[DOMAIN] = VERSION
    for function in functions(node.op_type for node in model.graph if node.domain == DOMAIN):
        model.functions[function.identifier()] = function
    return model


def _without_values(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters and buffers have shapes and no values: it costs no memory."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.to("meta") for b in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def _by_parameter(module: nn.Module, dynamic: Sequence[Mapping[int, object]]) -> tuple[object, ...]:
    """`dynamic` in the nesting of forward's signature: the inputs of `*args` form one tuple."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if kinds and kinds[-1] is inspect.Parameter.VAR_POSITIONAL:
        fixed = len(kinds) - 1
        return (*dynamic[:fixed], tuple(dynamic[fixed:]))
    return tuple(dynamic)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep what the exporter says about itself, not about the model, off the screen."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    # one warning for each of torchvision's operators when it is not installed
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 deep-copies its own tree specs through a class it has deprecated
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _forget_builder(model: ir.Model) -> None:
    """Drop what names the builder, the source or the time."""
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "lensc", None
    model.metadata_props.clear()
    for value in all_values(model):
        value.metadata_props.clear()


def _name_dimensions(model: ir.Model, spec: GraphSpec) -> None:
    """Give the exporter's symbols (s17) the names of the spec, also inside expressions such as `past + tokens`."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        for symbol, dim in zip(value.shape or (), tensor.shape, strict=True):
            if isinstance(symbol, ir.SymbolicDim) and isinstance(dim, str):
                names.setdefault(str(symbol.value), dim)
    for value in all_values(model):
        if value.shape is not None:
            dims = [d if isinstance(d, int) else _renamed(str(d.value), names) for d in value.shape]
            value.shape = ir.Shape(dims)


def _renamed(expression: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), expression)


def _check_signature(model: ir.Model, spec: GraphSpec) -> None:
    """Compare inputs and outputs with the spec, all of them."""
    problems = []
    for kind, values, tensors in (
        ("input", model.graph.inputs, spec.inputs),
        ("output", model.graph.outputs, spec.outputs),
    ):
        if len(values) != len(tensors):
            problems.append(f"expected {len(tensors)} {kind}s, traced {len(values)}")
            continue
        for value, tensor in zip(values, tensors, strict=True):
            found = _signature(value)
            if found != tensor:
                problems.append(f"expected {kind} {tensor}, traced {found}")
    if problems:
        raise GraphError(f"graph {spec.name}: " + "; ".join(problems))


def _signature(value: ir.Value) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
    dtype = "unknown" if value.dtype is None else value.dtype.numpy().name
    return TensorSpec(value.name or "", dtype, shape)  # type: ignore[arg-type]
