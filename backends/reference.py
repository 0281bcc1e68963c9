"""The reference engine: every operator in numpy, as the ONNX specification defines it. Slow, exact, and the oracle of
the backend suite.

The artifact is the portable graph itself, which shows that an artifact need not be compiled at all.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lensc.export.graph import Graph, GraphSpec
from lensc.export.quantize.scheme import Scheme

from .base import (
    Array,
    Artifact,
    Probe,
    Session,
    Target,
    check_compatibility,
    check_feeds,
    check_interface,
    check_out,
    file_record,
)
from .errors import ExecutionError, StorageError, UnavailableError, UnsupportedError
from .load_options import DEFAULTS, LoadOptions, settings_of

NAME = "reference"
INSTALL = "pip install 'lensc[export]'"


class Reference:
    """See `Backend`."""

    name = NAME

    def probe(self) -> tuple[Probe, ...]:
        """One probe, for the CPU."""
        try:
            onnx = _engine()
        except UnavailableError as error:
            return (Probe(NAME, "cpu", False, str(error)),)
        return (Probe(NAME, "cpu", True, f"onnx {onnx.__version__}"),)

    def supports(self, spec: GraphSpec, scheme: str, target: Target, linear_inputs: Collection[int] = ()) -> str | None:
        """Every graph of standard operators."""
        if (target.backend, target.processor, target.arch) != (NAME, "cpu", ""):
            return f"target {target} is not one of backend {NAME}; expected {NAME}:cpu"
        if Scheme.parse(scheme).kv_bits is not None:
            nearest = dataclasses.replace(Scheme.parse(scheme), kv_bits=None)
            return f"scheme {scheme}: backend {NAME} keeps the KV cache in float32; the nearest is {nearest}"
        return None

    def compile(self, graph: Graph, target: Target, out: Path) -> Artifact:
        """Copy the graph to `<out>/<target>.onnx`, and its data file: onnx reads none that has a second link."""
        reason = self.supports(graph.spec, graph.scheme, target)
        if reason:
            raise UnsupportedError(reason)
        onnx = _engine()
        sources, saved = _data_files(onnx, graph.path), out / f"{target.slug}.onnx"
        model = _read(onnx, graph.path)
        for tensor in model.graph.initializer:
            for entry in (entry for entry in tensor.external_data if entry.key == "location"):
                entry.value = f"{target.slug}.{entry.value}"
        data = [out / f"{target.slug}.{source.name}" for source in sources]
        try:
            for source, copy in zip(sources, data, strict=True):
                shutil.copyfile(source, partial := copy.with_name(f"{copy.name}.partial"))
                os.replace(partial, copy)
            partial = saved.with_name(f"{saved.name}.partial")
            partial.write_bytes(model.SerializeToString(deterministic=True))
            os.replace(partial, saved)
        except OSError as error:
            raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
        return Artifact(
            graph=graph.spec.name,
            target=target,
            scheme=graph.scheme,
            files=tuple(file_record(path, out.parent) for path in (saved, *data)),
            toolchain={"onnx": onnx.__version__},
            options={},
            compatibility={"onnx": f">={onnx.__version__}"},
            placement={"numpy": len(_read(onnx, graph.path).graph.node)},
        )

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        """Read the graph with all weights into memory. Threads are numpy's own affair: `options.threads` is ignored."""
        settings_of(options, {}, NAME)
        onnx = _engine()
        check_compatibility(artifact, {"onnx": onnx.__version__})
        path = bundle / artifact.files[0].path
        try:
            evaluator = onnx.reference.ReferenceEvaluator(str(path))
        except _unreadable(onnx) as error:
            raise ExecutionError(f"{path}: onnx cannot read it: {' '.join(str(error).split())}") from error
        check_interface(spec, evaluator.input_names, evaluator.output_names)
        return ReferenceSession(spec, evaluator)


class ReferenceSession:
    """A graph evaluated node by node."""

    def __init__(self, spec: GraphSpec, evaluator: Any) -> None:
        self.spec = spec
        self._evaluator: Any = evaluator

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once; see `Session.run`. Outputs in `out` are copied into place."""
        if self._evaluator is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        shapes = check_out(self.spec, check_feeds(self.spec, feeds), given)
        names = [t.name for t in self.spec.outputs]
        try:
            # overflow is a value in IEEE arithmetic, not an event
            with np.errstate(all="ignore"):
                computed = self._evaluator.run(names, dict(feeds))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            raise ExecutionError(f"graph {self.spec.name}: onnx failed: {' '.join(str(error).split())}") from error
        outputs: dict[str, Array] = {}
        for tensor, result in zip(self.spec.outputs, computed, strict=True):
            if result.shape != shapes[tensor.name] or result.dtype != np.dtype(tensor.dtype):
                raise ExecutionError(
                    f"graph {self.spec.name}: expected {tensor}, computed {result.dtype}{result.shape}"
                )
            outputs[tensor.name] = given.get(tensor.name, result)
            if tensor.name in given:
                np.copyto(outputs[tensor.name], result)
        return outputs

    def close(self) -> None:
        """Let go of the graph and its weights."""
        self._evaluator = None


def _engine() -> Any:
    """The onnx module with its evaluator. Raises UnavailableError that says how to install it."""
    try:
        import onnx
        import onnx.reference

        return onnx
    except ImportError as error:
        raise UnavailableError(f"backend {NAME} unavailable: {' '.join(str(error).split())}; {INSTALL}") from error


def _unreadable(onnx: Any) -> tuple[type[Exception], ...]:
    """What onnx raises for a file that is missing, damaged or hostile."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types

    return (OSError, ValueError, TypeError, RuntimeError, onnx.checker.ValidationError, DecodeError)


def _data_files(onnx: Any, path: Path) -> list[Path]:
    """The external data files of the graph at `path`, which lie beside it."""
    model = _read(onnx, path)
    names = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    strange = sorted(name for name in names if Path(name).name != name)
    if strange:
        raise ExecutionError(f"{path}: external data {strange[0]!r} does not lie beside the graph")
    return [path.with_name(name) for name in sorted(names)]


def _read(onnx: Any, path: Path) -> Any:
    try:
        return onnx.load(str(path), load_external_data=False)
    except _unreadable(onnx) as error:
        raise ExecutionError(f"{path}: onnx cannot read it: {' '.join(str(error).split())}") from error


backend = Reference()
