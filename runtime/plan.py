"""Which compiled artifact runs each graph, and why. A pure function: it touches no device and no file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lensc.backends.base import PROCESSORS, Artifact, Probe, Target
from lensc.backends.bundle import Manifest
from lensc.backends.errors import UnavailableError, UsageError

STATES = ("runs here", "emulated", "untested")
"""Best first: what was run on this machine's own silicon goes before an emulation."""


@dataclass(frozen=True)
class Timing:
    """What a candidate took when it was tried on this machine: `ms` of what candidates of a graph are compared by."""

    ms: float
    text: str
    """For readers: "12.3 ms per slice"."""
    spread: float = 1.0
    """How many times as long as the fastest run the median took: what else the machine was doing."""


Timings = Mapping[tuple[str, Target], Timing]
"""By graph and target."""

Refusals = Mapping[tuple[str, Target], str]
"""(graph, target) of artifacts that an engine refused to load, with its reason."""


@dataclass(frozen=True)
class Placement:
    """One graph on one target. `requested` is what the caller asked for, or None if the choice was left open."""

    graph: str
    artifact: Artifact
    requested: Target | None
    reason: str
    """Why this one, and why not the others, with what was measured."""
    state: str = STATES[0]
    """`runs here`, `emulated` or `untested`."""
    measured: Timing | None = None
    """Set if it was timed beside others."""

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
    timings: Timings | None = None,
) -> Plan:
    """Choose an artifact for every graph.

    Usable ones come in this order: runs here before emulated before untested; by what was measured, the fastest first; npu
    before gpu before cpu, because nobody compiles for the special processor to leave it idle; then the manifest's order.
    `requested` keeps for a graph only artifacts of its target (without `arch`: of any architecture). Raises UnavailableError
    if a graph has none, saying why each of its artifacts was refused.
    """
    placements: list[Placement] = []
    problems: list[str] = []
    for graph in manifest.graphs:
        wanted = (requested or {}).get(graph)
        usable, reasons = _sorted_out(graph, manifest, probes, wanted, refused or {})
        if not usable:
            problems.append(f"graph {graph}: " + ("; ".join(reasons) or "no artifact"))
            continue
        times = {a.target: (timings or {}).get((graph, a.target)) for a, _ in usable}
        usable.sort(key=lambda u: _rank(u[0], u[1], times[u[0].target]))
        artifact, probe = usable[0]
        timing = times[artifact.target]
        why = "requested" if wanted is not None else "best usable" if timing is None else f"fastest, {timing.text}"
        rest = [f"{a.target}: {_beside(times[a.target], p, probe)}" for a, p in usable[1:]] + reasons
        reason = "; ".join([f"{why}: {probe.state}, {probe.reason}", *rest])
        placements.append(Placement(graph, artifact, wanted, reason, probe.state, timing))
    if problems:
        raise UnavailableError(_message(manifest, problems, requested))
    return Plan(tuple(placements))


def contenders(
    manifest: Manifest,
    probes: Sequence[Probe],
    requested: Mapping[str, Target] | None = None,
    refused: Refusals | None = None,
) -> dict[str, list[Artifact]]:
    """By graph, the artifacts between which only a measurement can decide: several that are as good by their state, which is
    no emulation, of a graph for which nothing was requested. Graphs without such are left out.
    """
    found: dict[str, list[Artifact]] = {}
    for graph in manifest.graphs:
        if graph in (requested or {}):
            continue
        usable, _ = _sorted_out(graph, manifest, probes, None, refused or {})
        best = min((_state(probe) for _, probe in usable), default=0)
        equal = [artifact for artifact, probe in usable if _state(probe) == best and probe.state != "emulated"]
        if len(equal) > 1:
            found[graph] = equal
    return found


def _sorted_out(
    graph: str, manifest: Manifest, probes: Sequence[Probe], wanted: Target | None, refused: Refusals
) -> tuple[list[tuple[Artifact, Probe]], list[str]]:
    """The artifacts of a graph that can be taken, and why each of the others cannot."""
    usable: list[tuple[Artifact, Probe]] = []
    reasons: list[str] = []
    for artifact in (a for a in manifest.artifacts if a.graph == graph):
        probe = probe_of(artifact.target, probes)
        reason = _refusal(artifact, probe, wanted, refused)
        if reason is None and probe is not None:
            usable.append((artifact, probe))
        else:
            reasons.append(f"{artifact.target}: {reason}")
    return usable, reasons


def _beside(timing: Timing | None, probe: Probe, chosen: Probe) -> str:
    """What is said of a usable artifact that was not chosen."""
    if timing is not None:
        return timing.text
    return "usable, ranked lower" if probe.state == chosen.state else f"usable, ranked lower: {probe.state}"


def _rank(artifact: Artifact, probe: Probe, timing: Timing | None) -> tuple[int, bool, float, int]:
    """Smallest first; `sort` is stable, so the manifest's order decides between equals."""
    ms = 0.0 if timing is None else timing.ms
    return _state(probe), timing is None, ms, -PROCESSORS.index(artifact.target.processor)


def _state(probe: Probe) -> int:
    return STATES.index(probe.state) if probe.state in STATES else len(STATES)


def _refusal(artifact: Artifact, probe: Probe | None, requested: Target | None, refused: Refusals) -> str | None:
    """Why `artifact` cannot be taken, or None."""
    target = artifact.target
    if requested is not None and not answers(target, requested):
        return f"not the requested {requested}"
    if (artifact.graph, target) in refused:
        return refused[artifact.graph, target]
    if probe is None:
        return f"this package knows no {target.processor} of a backend {target.backend!r}"
    return None if probe.usable else probe.reason


def answers(target: Target, requested: Target) -> bool:
    """Whether an artifact for `target` is what `requested` asks for; without `arch`, of any architecture."""
    same = (target.backend, target.processor) == (requested.backend, requested.processor)
    return same and requested.arch in ("", target.arch)


def probe_of(target: Target, probes: Sequence[Probe]) -> Probe | None:
    """What a backend says of the processor of `target`."""
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
