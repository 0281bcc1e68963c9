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
import hashlib
import inspect
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from lensc.backends.errors import GraphError, StorageError

from .functions import DOMAIN, VERSION, functions
from .graph import Graph, GraphSpec, TensorSpec
from .models.minicpmv import MiniCPMV
from .models.session import graph_modules
from .passes import all_values, simplify

OPSET = 21
"""Opset 20 brought Gelu, 21 block-wise DequantizeLinear (int4 weights), which ONNX Runtime, its QNN provider and
OpenVINO all read. From 23 on RMSNorm, rotary embedding and attention are single operators, which QNN does not take."""

DATA_SUFFIX = ".data"

INLINE_BYTES = 1024
"""Tensors up to this size stay in the ONNX file, so that shapes and scalars can be read without the data file."""

PAGE = 4096
"""Tensors of the data file begin on a page, so that an engine can map them."""

Weights = Callable[[str], Tensor]
"""Returns the parameter of a name, of the traced shape, on the CPU. Called once per parameter, in file order."""


def export_model(model: MiniCPMV, folder: Path, weights: Weights | None = None) -> dict[str, Graph]:
    """Write `vision.onnx` and `decoder.onnx` with their data files into the existing `folder`; return both graphs.

    With `weights` the model may lie on the meta device; without, its own parameters are written.
    """
    return {
        name: export_graph(module, example_inputs(spec), spec, folder / f"{name}.onnx", weights)
        for name, (module, spec) in graph_modules(model).items()
    }


def export_graph(
    module: nn.Module, example: Sequence[Tensor], spec: GraphSpec, path: Path, weights: Weights | None = None
) -> Graph:
    """Trace `module` and write it to `path`, with its weights in one file beside it.

    `module` takes and returns tensors in the order of `spec`, and makes tensors of its own on its inputs' device;
    `example` are inputs of any value and of sizes that differ from each other and from 1. Raises GraphError if the
    traced graph is not the one `spec` describes, StorageError if it cannot be written. Files are replaced only by
    complete ones.
    """
    parameters = dict(module.state_dict())
    if weights is None and any(p.device.type == "meta" for p in parameters.values()):
        raise GraphError(f"graph {spec.name}: the module lies on the meta device and has no values; pass `weights`")
    model = _trace(module, example, spec)
    simplify(model, frozenset(parameters))
    _forget_builder(model)
    _name_dimensions(model, spec)
    _check_signature(model, spec)
    _attach_weights(model, parameters, weights)
    return Graph(spec, path, "f32", _write(model, path))


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


def _attach_weights(model: ir.Model, parameters: Mapping[str, Tensor], weights: Weights | None) -> None:
    """Let every parameter's initializer read its value when it is written, and only then."""
    read = parameters.__getitem__ if weights is None else weights
    for name, value in model.graph.initializers.items():
        if name in parameters:
            assert value.dtype is not None and isinstance(value.shape, ir.Shape)
            value.const_value = ir.LazyTensor(partial(_read, read, name, value), value.dtype, value.shape, name=name)


def _read(weights: Weights, name: str, value: ir.Value) -> ir.TensorProtocol:
    """The weight `name` as `value` declares it. Raises GraphError if it has another shape or dtype."""
    tensor = weights(name).detach()
    assert value.dtype is not None
    found, expected = tuple(tensor.shape), tuple(value.shape or ())
    dtype = str(tensor.dtype).removeprefix("torch.")
    if found != expected or dtype != value.dtype.numpy().name:
        raise GraphError(
            f"weight {name}: expected {value.dtype.numpy().name}{list(expected)}, got {dtype}{list(found)}"
        )
    return ir.Tensor(tensor.contiguous().numpy(), name=name)


def _write(model: ir.Model, path: Path) -> str:
    """Write `path` and its data file, the data first; return the SHA-256 of model then data."""
    data = path.with_name(path.name + DATA_SUFFIX)
    partial_folder = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        try:
            # the data file's name is written into the model, so both get their final names in a folder of their own
            ir.save(
                model,
                partial_folder / path.name,
                external_data=data.name,
                size_threshold_bytes=INLINE_BYTES,
                alignment=PAGE,
                align_threshold=PAGE,
            )
            written = [p for p in (partial_folder / path.name, partial_folder / data.name) if p.exists()]
            digest = hashlib.sha256()
            for file in written:
                with open(file, "rb") as opened:
                    while piece := opened.read(1 << 20):
                        digest.update(piece)
            for file in reversed(written):
                os.replace(file, path.with_name(file.name))
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    return digest.hexdigest()
