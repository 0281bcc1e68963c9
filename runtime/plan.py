"""Which compiled artifact runs each graph, and why. A pure function: it touches no device and no file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lensc.backends.base import PROCESSORS, Artifact, Probe, Target
from lensc.backends.bundle import Manifest
from lensc.backends.errors import UnavailableError, UsageError

STATES = ("runs here", "emulated", "untested")
"""Best first: what was run on this machine's own silicon goes before an emulation."""

Refusals = Mapping[tuple[str, Target], str]
"""(graph, target) of artifacts that an engine refused to load, with its reason."""


@dataclass(frozen=True)
class Placement:
    """One graph on one target. `requested` is what the caller asked for, or None if the choice was left open."""

    graph: str
    artifact: Artifact
    requested: Target | None
    reason: str
    """Why this one, and why not those that would have come before it."""

    @property
    def effective(self) -> Target:
        """Where the graph runs."""
        return self.artifact.target


@dataclass(frozen=True)
class Plan:
    """A placement for every graph of the bundle, in the manifest's order."""

    placements: tuple[Placement, ...]

    def __getitem__(self, graph: str) -> Placement:
        return {p.graph: p for p in self.placements}[graph]


def parse_devices(text: str, graphs: Collection[str]) -> dict[str, Target]:
    """What was asked for each graph: `onnxruntime:cpu` for all of `graphs`, or `vision=qnn:npu:sm8650,decoder=native:cpu`.

    Raises UsageError that names what is wrong.
    """
    if "=" not in text:
        return dict.fromkeys(graphs, Target.parse(text))
    requested: dict[str, Target] = {}
    for part in text.split(","):
        graph, equals, target = part.strip().partition("=")
        if not equals or graph not in graphs:
            raise UsageError(
                f"device {text!r}: {part.strip()!r}: expected GRAPH=TARGET, a graph being one of {', '.join(graphs)}"
            )
        if graph in requested:
            raise UsageError(f"device {text!r}: {graph} is named twice")
        requested[graph] = Target.parse(target)
    return requested


def plan(
    manifest: Manifest,
    probes: Sequence[Probe],
    requested: Mapping[str, Target] | None = None,
    refused: Refusals | None = None,
) -> Plan:
    """Choose an artifact for every graph.

    Usable ones come in this order: runs here before emulated before untested; npu before gpu before cpu, because nobody
    compiles for the special processor to leave it idle; then the manifest's order. `requested` keeps for a graph only
    artifacts of its target (without `arch`: of any architecture). Raises UnavailableError if a graph has none, saying why each of
    its artifacts was refused.
    """
    placements: list[Placement] = []
    problems: list[str] = []
    for graph in manifest.graphs:
        wanted = (requested or {}).get(graph)
        usable: list[tuple[Artifact, Probe]] = []
        reasons: list[str] = []
        for artifact in (a for a in manifest.artifacts if a.graph == graph):
            probe = _probe_of(artifact.target, probes)
            reason = _refusal(artifact, probe, wanted, refused or {})
            if reason is None and probe is not None:
                usable.append((artifact, probe))
            else:
                reasons.append(f"{artifact.target}: {reason}")
        if not usable:
            problems.append(f"graph {graph}: " + ("; ".join(reasons) or "no artifact"))
            continue
        usable.sort(key=lambda u: _rank(*u))
        artifact, probe = usable[0]
        why = "requested" if wanted is not None else "best usable"
        rest = [f"{a.target}: usable, ranked lower" for a, _ in usable[1:]] + reasons
        reason = "; ".join([f"{why}: {probe.state}, {probe.reason}", *rest])
        placements.append(Placement(graph, artifact, wanted, reason))
    if problems:
        raise UnavailableError(_message(manifest, problems, requested))
    return Plan(tuple(placements))


def _rank(artifact: Artifact, probe: Probe) -> tuple[int, int]:
    """Smallest first; `sort` is stable, so the manifest's order decides between equals."""
    state = STATES.index(probe.state) if probe.state in STATES else len(STATES)
    return state, -PROCESSORS.index(artifact.target.processor)


def _refusal(artifact: Artifact, probe: Probe | None, requested: Target | None, refused: Refusals) -> str | None:
    """Why `artifact` cannot be taken, or None."""
    target = artifact.target
    if requested is not None and not _answers(target, requested):
        return f"not the requested {requested}"
    if (artifact.graph, target) in refused:
        return refused[artifact.graph, target]
    if probe is None:
        return f"this package knows no {target.processor} of a backend {target.backend!r}"
    return None if probe.usable else probe.reason


def _answers(target: Target, requested: Target) -> bool:
    same = (target.backend, target.processor) == (requested.backend, requested.processor)
    return same and requested.arch in ("", target.arch)


def _probe_of(target: Target, probes: Sequence[Probe]) -> Probe | None:
    for probe in probes:
        if (probe.backend, probe.processor) == (target.backend, target.processor):
            return probe
    return None


def _message(manifest: Manifest, problems: list[str], requested: Mapping[str, Target] | None) -> str:
    if not manifest.artifacts:
        return "no compiled artifacts, only portable graphs: lensc compile GRAPHS --target TARGET -o BUNDLE makes them"
    built = ", ".join(sorted({str(a.target) for a in manifest.artifacts}))
    asked = " and ".join(sorted({str(target) for target in (requested or {}).values()}))
    wanted = f"for {asked}" if asked else "on this machine"
    return f"nothing runs {wanted}: " + " | ".join(problems) + f"; the bundle was built for {built}"
