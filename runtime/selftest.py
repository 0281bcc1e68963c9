"""The golden probe: tiny recorded inputs go through every loaded graph, and the outputs must be the recorded ones.

A driver, an engine version or a chip that computes something else is found when the bundle is loaded, not by readers of
a wrong answer. One that never answers is given up after a time that any device takes less of.
"""

from __future__ import annotations

import dataclasses
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lensc.backends.base import PROBE_TOLERANCE, Array, Artifact, Session
from lensc.backends.bundle import ProbeRecord
from lensc.backends.errors import ExecutionError, LensError, ManifestError, ParityError
from lensc.export.graph import GraphSpec

LEAST_S, BYTES_PER_S, EMULATION = 60.0, 20e6, 20
"""The longest that a probe, or whatever a process of its own does with a graph, may take: so many seconds and one for so many
bytes of its artifact, which is five times what the slowest engine takes to load 4 GB; an emulation so many times as long."""


class SilentError(ParityError):
    """A probe was not answered in time. Its thread cannot be ended, and the session, which it is still in, not be closed."""


def limit_s(artifact: Artifact, state: str) -> float:
    """How many seconds an artifact may take to answer a golden probe."""
    seconds = LEAST_S + sum(file.bytes for file in artifact.files) / BYTES_PER_S
    return seconds * EMULATION if state == "emulated" else seconds


def tolerances_of(artifact: Artifact) -> dict[str, float]:
    """What an artifact that computes less exactly than its graph is allowed, for `run_selftest`; empty for others."""
    if PROBE_TOLERANCE not in artifact.parity:
        return {}
    return {artifact.graph: float(artifact.parity[PROBE_TOLERANCE])}


@dataclass(frozen=True)
class ProbeResult:
    """How far a graph's outputs are from those recorded. `max_abs` is inf for a wrong shape and nan for NaN outputs."""

    graph: str
    file: str
    max_abs: float
    worst: str
    """Name of the output that is furthest off."""
    tolerance: float

    @property
    def passed(self) -> bool:
        # Written so that nan fails.
        return self.max_abs <= self.tolerance


def run_selftest(
    probes: Sequence[ProbeRecord],
    sessions: Mapping[str, Session],
    folder: Path,
    tolerances: Mapping[str, float] | None = None,
    limit_s: float | None = None,
    tokens: int | None = None,
) -> tuple[ProbeResult, ...]:
    """Run the probes of every graph in `sessions`; paths are relative to `folder`.

    `tolerances` by graph replace the probes' own, for an artifact that computes less exactly than its graph. `tokens`: a graph
    that takes tokens is given the first so many of those recorded.
    Raises ManifestError if a probe file cannot be used, ExecutionError if an engine fails, SilentError if one does not answer
    within `limit_s`. It is then waited for no more; but its thread goes on, keeps what it holds of memory and processor, and
    an engine that never lets Python run while it hangs cannot be left at all: that takes a process of its own (`trial`).
    """
    allowed = tolerances or {}

    def work() -> tuple[ProbeResult, ...]:
        return tuple(
            _run(
                dataclasses.replace(probe, tolerance=allowed.get(probe.graph, probe.tolerance)),
                sessions[probe.graph],
                folder,
                tokens,
            )
            for probe in probes
            if probe.graph in sessions
        )

    return work() if limit_s is None else _within(limit_s, work)


def _within(limit_s: float, work: Callable[[], tuple[ProbeResult, ...]]) -> tuple[ProbeResult, ...]:
    """What `work` returns or raises, in a thread that is left behind if it takes longer."""
    made: list[tuple[ProbeResult, ...]] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            made.append(work())
        except (LensError, MemoryError) as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="golden probe", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise SilentError(f"the golden probe was not answered within {limit_s:.0f} s")
    if not made:
        raise raised[0] if raised else ExecutionError("the golden probe ended by a bug, which is told above")
    return made[0]


def check(results: Sequence[ProbeResult], targets: Mapping[str, str]) -> None:
    """Raise ParityError that names every failed probe. `targets` says where each graph ran."""
    failed = [
        f"{r.graph} on {targets[r.graph]}: {r.worst} differs by {r.max_abs:.3g}, tolerance {r.tolerance:.3g} ({r.file})"
        for r in results
        if not r.passed
    ]
    if failed:
        raise ParityError(
            "self-test failed: " + "; ".join(failed) + "; the engine here does not compute what was verified when the "
            "bundle was built: choose another target, or load with selftest=False to look into it"
        )


def _run(probe: ProbeRecord, session: Session, folder: Path, tokens: int | None) -> ProbeResult:
    arrays = _read(folder / probe.file)
    feeds = {name[3:]: a for name, a in arrays.items() if name.startswith("in.")}
    expected = {name[4:]: a for name, a in arrays.items() if name.startswith("out.")}
    known = {t.name for t in session.spec.outputs}
    if not expected or not expected.keys() <= known or len(feeds) + len(expected) != len(arrays):
        raise ManifestError(
            f"{folder / probe.file}: arrays {', '.join(sorted(arrays))}: expected in.<name> for every input and "
            f"out.<name> for outputs of graph {probe.graph}"
        )
    if tokens is not None:
        feeds, expected = _first(tokens, session.spec, feeds, expected)
    outputs = session.run(feeds)
    differences = {name: _difference(outputs[name], array) for name, array in expected.items()}
    worst = max(differences, key=lambda n: np.inf if np.isnan(differences[n]) else differences[n])
    return ProbeResult(probe.graph, probe.file, differences[worst], worst, probe.tolerance)


def _first(
    tokens: int, spec: GraphSpec, feeds: dict[str, Array], expected: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The first recorded tokens, and what was recorded of them: it does not depend on the tokens behind them."""
    shapes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    rows = int(np.count_nonzero(feeds["logit_positions"] < tokens)) if "logit_positions" in feeds else 0

    def cut(arrays: dict[str, Array]) -> dict[str, Array]:
        ends = {"tokens": tokens, "rows": rows}
        parts = {name: tuple(slice(ends.get(str(size))) for size in shapes.get(name, ())) for name in arrays}
        return {name: np.ascontiguousarray(array[parts[name]]) for name, array in arrays.items()}

    return cut(feeds), cut(expected)


def _difference(got: Array, expected: Array) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(got.astype(np.float64) - expected), initial=0.0))


def _read(path: Path) -> dict[str, Array]:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ManifestError(f"{path}: not an npz file; build the bundle again")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ManifestError(f"{path}: cannot be read as npz: {error}; build the bundle again") from error
