"""Whether graphs of a bundle compute what was recorded, each target in a process of its own.

A driver that hangs or ends its process is an outcome like any other. The child loads one graph after another, runs its
golden probes, and where the bundle is the tiny model's compares the answer, too:

    python -m lensc.runtime.checkup JOBS

JOBS is a JSON list of [bundle, target, graph, ...].
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lensc.backends import registry
from lensc.backends.base import Artifact, StaticBackend, Target
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import ExecutionError, LensError, UnavailableError, UnsupportedError
from lensc.export.graph import Graph

from . import child, selftest, tiny

COMMAND = child.python("lensc.runtime.checkup")
"""What is started."""
LIMIT_S = selftest.LEAST_S
"""For small graphs."""

FLOAT16_PROBE = 0.03
"""How far off outputs of the order of 1 may be where a float32 graph is computed in float16: five times what emulation was."""


@dataclass(frozen=True)
class Job:
    """Graphs of a bundle on one target."""

    bundle: Path
    target: Target
    graphs: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a job. `problem` is empty if all is right; `kind` is the name of the error, or `crash` or `timeout`."""

    problem: str
    kind: str
    found: str
    """How far off the probes were."""
    seconds: float


def run(jobs: Sequence[Job], limit_s: float) -> list[Outcome]:
    """Do `jobs` in a child, which is stopped after `limit_s`. What it dies of is the outcome of the job that it was at, and
    of those behind it.
    """
    started = time.monotonic()
    asked = [(str(job.bundle.absolute()), str(job.target), *job.graphs) for job in jobs]
    try:
        answers = child.ask([*COMMAND, json.dumps(asked)], limit_s)
        said, problem, kind = answers.said, answers.problem, answers.kind
    except ExecutionError as error:
        said, problem, kind = (), str(error), "crash"
    outcomes = [Outcome(**one) for one in said[: len(jobs)]]
    return outcomes + [Outcome(problem, kind, "", time.monotonic() - started)] * (len(jobs) - len(outcomes))


def limit_s(manifest: Manifest, target: Target, graphs: Sequence[str]) -> float:
    """The longest that a check of artifacts of this size may take."""
    artifacts = [a for a in manifest.artifacts if a.target == target and a.graph in graphs]
    return LIMIT_S + sum(record.bytes for a in artifacts for record in a.files) / selftest.BYTES_PER_S


def check(bundle: Path, target: Target, graphs: Sequence[str]) -> str:
    """Load each of `graphs` on `target` in this process and compare its golden probes; say how far off they were.

    A graph that has no artifact is compiled first, in the bundle: that is how engines are tried whose artifacts hold on
    one machine. Raises ParityError, and what loading, compiling and running do.
    """
    manifest = load_manifest(bundle)
    said = []
    for name in graphs:
        artifact = next((a for a in manifest.artifacts if (a.graph, a.target) == (name, target)), None)
        if artifact is None:
            artifact = _compile(bundle, manifest, name, target)
        allowed = selftest.tolerances_of(artifact)
        if not allowed and artifact.scheme == "f16" != manifest.graphs[name].scheme:
            allowed[name] = FLOAT16_PROBE
        session = registry.get(target.backend).load(artifact, manifest.graphs[name].spec, bundle)
        try:
            results = selftest.run_selftest(manifest.probes, {name: session}, bundle, allowed)
        finally:
            session.close()
        selftest.check(results, {name: str(target)})
        if not results:
            raise ExecutionError(f"{bundle}: no golden probe of {name}; build the bundle again")
        worst = max(results, key=lambda result: result.max_abs / result.tolerance)
        said.append(f"{name} within {worst.max_abs:.1e} (tolerance {worst.tolerance:.1e})")
    if {a.graph for a in manifest.artifacts if a.target == target} == set(manifest.graphs) == set(graphs):
        tiny.check_answer(manifest, bundle, str(target))
    return ", ".join(said)


def _compile(bundle: Path, manifest: Manifest, name: str, target: Target) -> Artifact:
    record, backend = manifest.graphs[name], registry.get(target.backend)
    if record.file is None:
        raise UnavailableError(f"{bundle}: {name} has no artifact for {target} and no portable graph")
    if isinstance(backend, StaticBackend) and backend.needs_ranges(record.scheme):
        raise UnsupportedError(f"{target}: {name} in {record.scheme} needs calibration; lensc build does it")
    graph = Graph(record.spec, bundle / record.file, record.scheme, record.sha256)
    out = bundle / f"{target.slug}-{name}"
    out.mkdir()
    return backend.compile(graph, target, out)


def main(arguments: Sequence[str]) -> int:
    """The child: answer what `check` says or raises, a line for each job."""
    answer = child.answering()
    for bundle, target, *graphs in json.loads(arguments[0]):
        started = time.monotonic()
        problem = kind = found = ""
        try:
            found = check(Path(bundle), Target.parse(target), graphs)
        except LensError as error:
            problem, kind = str(error), type(error).__name__
        answer({"problem": problem, "kind": kind, "found": found, "seconds": time.monotonic() - started})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
