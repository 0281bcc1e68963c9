"""Real sessions that go wrong: what a broken driver does, from a given run on.

As a script it is the process that a candidate is tried in, with the fault that $LENSC_FAULT names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lensc.backends import registry
from lensc.backends.base import Array, Artifact, Backend, Cache
from lensc.backends.errors import ExecutionError
from lensc.backends.load_options import DEFAULTS, LoadOptions
from lensc.export.graph import GraphSpec

VARIABLE = "LENSC_FAULT"
REAL = registry.get


@dataclass
class Fault:
    """`kind`: zeros, nan, before (the outputs of the run before), nothing (outputs are left as they are), raise, hang, crash;
    load: the artifact cannot be loaded.

    It begins with run `at` of the graph on the backend, from 1, over all sessions; golden probes are runs, too.
    """

    graph: str
    backend: str
    kind: str
    at: int = 1
    runs: int = 0

    def due(self) -> bool:
        self.runs += 1
        return self.runs >= self.at


class FaultySession:
    """See `CachedSession`; of a graph without states only what `Session` has is used."""

    def __init__(self, session: Any, fault: Fault) -> None:
        self.spec = session.spec
        self._session = session
        self._fault = fault
        self._last: dict[str, Array] = {}

    def run(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        return self._wrong(lambda given: self._session.run(feeds, given), out)

    def _wrong(self, run: Callable[[Any], dict[str, Array]], out: Mapping[str, Array] | None) -> dict[str, Array]:
        fault = self._fault
        due = fault.due()
        if due and fault.kind == "raise":
            raise ExecutionError("the device was lost")
        if due and fault.kind == "hang":
            time.sleep(3600 if __name__ == "__main__" else 2)
        if due and fault.kind == "crash":
            os.abort()
        if due and fault.kind == "nothing" and out is not None:
            return run({name: array.copy() for name, array in out.items()}) and dict(out)
        outputs = run(out)
        if due:
            for name, array in outputs.items():
                array[...] = {"zeros": 0, "nan": np.nan}.get(fault.kind, self._last.get(name, 0))
        self._last = {name: array.copy() for name, array in outputs.items()}
        return outputs

    def close(self) -> None:
        self._session.close()


class FaultyCachedSession(FaultySession):
    @property
    def prefill_chunk(self) -> int:
        return int(self._session.prefill_chunk)

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        made: Cache = self._session.new_cache(capacity, batch)
        return made

    def step(
        self, feeds: Mapping[str, Array], cache: Cache, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        return self._wrong(lambda given: self._session.step(feeds, cache, given), out)


@dataclass
class FaultyBackend:
    """A backend whose sessions of a graph have a fault."""

    real: Backend
    fault: Fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Any:
        if (artifact.graph, "load") == (self.fault.graph, self.fault.kind):
            raise ExecutionError("the device is busy")
        session = self.real.load(artifact, spec, bundle, options)
        if artifact.graph != self.fault.graph:
            return session
        return (FaultyCachedSession if spec.states else FaultySession)(session, self.fault)


def getter(*faults: Fault) -> Callable[[str], Any]:
    """What takes the place of `registry.get`."""

    def get(name: str) -> Any:
        backend: Any = REAL(name)
        for fault in faults:
            if fault.backend == name:
                backend = FaultyBackend(backend, fault)
        return backend

    return get


if __name__ == "__main__":
    registry.get = getter(Fault(**json.loads(os.environ[VARIABLE])))  # type: ignore[assignment]
    from lensc.runtime import trial

    sys.exit(trial.main())
