"""What a graph is, without torch: names, dtypes, shapes, state pairs and where the ONNX file lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DType = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
"""numpy's names, so that `numpy.dtype(spec.dtype)` works."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A `str` in `shape` is a symbolic dimension, e.g. `("batch", "tokens", 256)`."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class DimRange:
    """The sizes a symbolic dimension can take: smallest, the one to optimize for, largest."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class StatePair:
    """A pair that carries the KV cache: `output` holds the new rows, to be appended to `input` along `axis`."""

    input: str
    output: str
    axis: int = 0


@dataclass(frozen=True)
class GraphSpec:
    """The interface of a graph: all an engine or the runtime needs to know besides the file."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StatePair, ...]
    dims: dict[str, DimRange]

    @property
    def stateless(self) -> GraphSpec:
        """The interface without the KV cache, where an engine keeps it."""
        states = {name for pair in self.states for name in (pair.input, pair.output)}
        inputs, outputs = (tuple(t for t in some if t.name not in states) for some in (self.inputs, self.outputs))
        return GraphSpec(self.name, inputs, outputs, (), self.dims)

    def input(self, name: str) -> TensorSpec:
        """The input called `name`; KeyError if there is none."""
        return {t.name: t for t in self.inputs}[name]

    def output(self, name: str) -> TensorSpec:
        """The output called `name`; KeyError if there is none."""
        return {t.name: t for t in self.outputs}[name]


@dataclass(frozen=True)
class Graph:
    """A portable graph on disk: ONNX with external data beside it.

    `scheme` is the spelling of the quantization scheme (`str(Scheme)`), `sha256` that of the ONNX file
    followed by its external data. `ranges` is the file in which a `StaticBackend` has written the ranges of activations;
    `cpu_nodes` are the nodes that may run on the CPU where all others must not, `context` the tokens of past that a decoder of
    fixed shapes is made for.
    """

    spec: GraphSpec
    path: Path
    scheme: str
    sha256: str
    ranges: Path | None = None
    cpu_nodes: tuple[str, ...] = ()
    context: int | None = None
