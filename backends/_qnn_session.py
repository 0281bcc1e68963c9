"""A vision graph that is loaded: on the NPU in this process, by emulation in another.

What a call holds is run slice by slice, each padded to the size that was compiled for. Biases are cut at -100: see
`_qnn_form.HIDDEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lensc.export.graph import GraphSpec

from ._qnn_form import BIASES, HIDDEN, Form
from .base import Array, check_feeds, check_out, writeable
from .errors import ExecutionError

Run = Callable[[int, Mapping[str, Array]], Mapping[str, Array]]
"""Runs the graph of an index on arrays of its compiled shapes."""


def padded(spec: GraphSpec, feeds: Mapping[str, Array], form: Form) -> dict[str, Array]:
    """One slice, grown to the patches of `form`; what is added is hidden. Arrays are new."""
    fixed = {}
    for tensor in spec.inputs:
        given = feeds[tensor.name]
        array = np.full(form.shape(tensor), HIDDEN if tensor.name in BIASES else 0, tensor.dtype)
        array[:, : given.shape[1]] = np.maximum(given, HIDDEN) if tensor.name in BIASES else given
        fixed[tensor.name] = array
    return fixed


class QnnSession:
    """See `Session`."""

    def __init__(self, spec: GraphSpec, form: Form, run: Run, close: Callable[[], None]) -> None:
        """`run` takes and gives arrays of the compiled shapes."""
        self.spec = spec
        self._form = form
        self._run: Run | None = run
        self._close = close

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once a slice; see `Session.run`. Raises ExecutionError for more patches than were compiled for, too."""
        if self._run is None:
            raise ExecutionError(f"graph {self.spec.name}: the session is closed")
        given = {} if out is None else out
        sizes = check_feeds(self.spec, feeds)
        most = self._form.sizes["patches"]
        if sizes["patches"] > most:
            raise ExecutionError(
                f"graph {self.spec.name}: a slice of {sizes['patches']} patches, compiled for {most} at most; "
                "crop the picture to a less extreme shape, or run it on another device"
            )
        outputs = writeable(self.spec, check_out(self.spec, sizes, given), given)
        for i in range(sizes["slices"]):
            piece = {name: array[i : i + 1] for name, array in feeds.items()}
            for name, array in self._run(0, padded(self.spec, piece, self._form)).items():
                outputs[name][i : i + 1] = array
        return outputs

    def close(self) -> None:
        """Free what the engine holds, or end the process that emulates."""
        self._run = None
        self._close()
