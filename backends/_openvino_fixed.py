"""A graph on a device that runs fixed sizes only, as Intel's NPUs do.

What a call holds is cut along the first dimension, which is common to all inputs and outputs, and each piece is padded
to the next size that was compiled for. Padding changes nothing where every padded input that decides who sees whom is
an additive bias: those are padded with "not this key".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lensc.export.graph import GraphSpec, TensorSpec

from ._openvino_lower import HIDDEN
from ._openvino_session import bind, engine_errors
from .base import Array, check_feeds, check_out
from .errors import ExecutionError

BIAS = "_bias"
"""How the names of additive biases end."""


def cannot_be_fixed(spec: GraphSpec) -> str | None:
    """Why the graph cannot run at fixed sizes, or None."""
    if spec.states:
        return "its cache grows with every token"
    first = {t.shape[0] for t in (*spec.inputs, *spec.outputs)}
    if len(first) != 1:
        return f"its inputs and outputs have no first dimension in common, found {', '.join(sorted(map(str, first)))}"
    padded = _padded(spec)
    if any(dim in padded for t in spec.outputs for dim in t.shape[1:]):
        return "its outputs have dimensions that are not fixed"
    if padded and not any(t.name.endswith(BIAS) for t in spec.inputs):
        return f"it has no input *{BIAS} to hide the padding of {', '.join(sorted(padded))}"
    return None


def sizes_of(spec: GraphSpec) -> tuple[dict[str, int], ...]:
    """The sizes to compile for: the usual one and the largest."""
    usual, largest = ({name: getattr(spec.dims[name], which) for name in _padded(spec)} for which in ("opt", "max"))
    return (usual, largest) if usual != largest else (largest,)


def shapes_at(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """The shape of every input at `sizes`, one piece at a time."""
    return {t.name: [1, *(d if isinstance(d, int) else sizes[d] for d in t.shape[1:])] for t in spec.inputs}


class FixedSession:
    """See `Session`. `compile_at` makes a compiled model for shapes of inputs; larger sizes are compiled when needed."""

    def __init__(self, spec: GraphSpec, compile_at: Callable[[Mapping[str, list[int]]], Any]) -> None:
        self.spec = spec
        self._compile_at: Callable[[Mapping[str, list[int]]], Any] | None = compile_at
        self._requests: dict[int, Any] = {}
        self._request(0)

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once for each piece; see `Session.run`."""
        if self._compile_at is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        shapes = check_out(self.spec, sizes, given)
        outputs = {n: given[n] if n in given else np.empty(s, self.spec.output(n).dtype) for n, s in shapes.items()}
        which = self._smallest(sizes)
        fixed = shapes_at(self.spec, sizes_of(self.spec)[which])
        inputs = {t.name: _padding(t, fixed[t.name]) for t in self.spec.inputs}
        with engine_errors(f"graph {self.spec.name}"):
            request = self._request(which)
            for i in range(len(next(iter(outputs.values())))):
                for name, array in inputs.items():
                    array[tuple(slice(n) for n in (1, *feeds[name].shape[1:]))] = feeds[name][i : i + 1]
                bind(request, inputs)
                bind(request, {name: array[i : i + 1] for name, array in outputs.items()})
                request.infer()
        return outputs

    def close(self) -> None:
        """Free what the engine holds."""
        self._compile_at = None
        self._requests.clear()

    def _request(self, which: int) -> Any:
        if which not in self._requests:
            assert self._compile_at is not None
            compiled = self._compile_at(shapes_at(self.spec, sizes_of(self.spec)[which]))
            self._requests[which] = compiled.create_infer_request()
        return self._requests[which]

    def _smallest(self, sizes: Mapping[str, int]) -> int:
        """The first of the compiled sizes that holds `sizes`. Raises ExecutionError if none does."""
        choices = sizes_of(self.spec)
        for i, choice in enumerate(choices):
            if all(sizes[name] <= size for name, size in choice.items()):
                return i
        over = [f"{n} {sizes[n]}, at most {size}" for n, size in choices[-1].items() if sizes[n] > size]
        raise ExecutionError(f"graph {self.spec.name}: larger than it was compiled for: {'; '.join(over)}")


def _padding(tensor: TensorSpec, shape: list[int]) -> Array:
    return np.full(shape, HIDDEN if tensor.name.endswith(BIAS) else 0, tensor.dtype)


def _padded(spec: GraphSpec) -> set[str]:
    """The symbolic dimensions behind the first."""
    return {dim for t in (*spec.inputs, *spec.outputs) for dim in t.shape[1:] if isinstance(dim, str)}
