"""Manifests and devices as text for people, and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lensc.backends.base import Artifact, Probe
from lensc.backends.bundle import Manifest, MeasuredRecord, ParityRecord
from lensc.backends.codec import encode
from lensc.export.graph import GraphSpec
from lensc.export.quantize.scheme import MARKS
from lensc.profiles.probe import Machine

from .console import printable, size, table

RECIPE = "recipe"
"""The metadata that hold the recipe as TOML."""


def as_json(manifest: Manifest) -> Any:
    """The manifest as it stands in manifest.json."""
    return encode(manifest)


def summary(manifest: Manifest, folder: Path) -> str:
    """What was made, in a few lines."""
    total = size(sum(f.bytes for f in manifest.files))
    kind = "bundle" if manifest.artifacts else "graphs"
    lines = [f"{kind} {folder}: {printable(manifest.model.name)}, {manifest.provenance.scheme}, {total}"]
    if manifest.artifacts:
        lines.append(_artifacts(manifest))
        compiled = {artifact.graph for artifact in manifest.artifacts}
        lines += [
            f"  {name}: compiled for no target of this command, and lensc run needs it: add e.g. --target {name}=native:cpu"
            for name in manifest.graphs
            if name not in compiled
        ]
    if manifest.parity:
        lines.append(parity(manifest.parity))
    return "\n".join(lines)


def details(manifest: Manifest, folder: Path, verified: bool) -> str:
    """All that `lensc inspect` shows."""
    model, made = manifest.model, manifest.provenance
    picture, decoder = model.picture, model.decoder
    total = size(sum(f.bytes for f in manifest.files))
    checked = "sizes and SHA-256 of all files are right" if verified else "sizes of all files are right"
    sides = f"{picture.scale_resolution} pixels, at most {picture.max_slice_nums} cells"
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    stops = ", ".join(map(str, model.generation.eos_token_ids))
    facts = [
        ("model", model.name),
        ("files", f"{len(manifest.files)}, {total}; {checked}"),
        ("made by", f"lensc {made.lensc_version}, {made.created}: {made.command}"),
        ("with", versions or "unknown versions"),
        ("checkpoint", f"sha256 {made.checkpoint_sha256}"),
        ("scheme", made.scheme + (f": {MARKS[made.scheme]}" if made.scheme in MARKS else "")),
        ("pictures", f"{sides}, {picture.query_num} embeddings a slice, vision_padding {picture.vision_padding}"),
        ("decoder", f"{decoder.num_layers} layers, width {decoder.hidden_size}, {decoder.vocab_size} tokens"),
        ("context", f"{decoder.context_length} tokens, stop ids {stops}"),
        *sorted((name, text) for name, text in manifest.metadata.items() if name != RECIPE),
    ]
    parts = [f"{folder}: bundle format {manifest.format}", table([(k, printable(v)) for k, v in facts], "  ")]
    if RECIPE in manifest.metadata:
        lines = [f"  {printable(line)}" for line in manifest.metadata[RECIPE].splitlines() if line]
        parts.append("\n".join(["recipe", *lines]))
    parts.append("graphs\n" + _graphs(manifest))
    parts.append("artifacts\n" + (_artifacts(manifest) or "  none; make a bundle with lensc compile"))
    parts.append("parity\n" + (parity(manifest.parity) or "  not measured"))
    if manifest.measured:
        parts.append("measured elsewhere\n" + measured(manifest.measured))
    probes = [(p.graph, p.file, f"tolerance {p.tolerance:.3g}") for p in manifest.probes]
    parts.append("golden probes\n" + (table(probes, "  ") if probes else "  none"))
    stages = [(r.name, f"{r.seconds:.1f} s", f"peak memory {size(r.peak_bytes)}") for r in manifest.stages]
    parts.append(
        "build\n" + (table([[printable(c) for c in row] for row in stages], "  ") if stages else "  not recorded")
    )
    return "\n\n".join(parts)


def devices(machine: Machine, probes: Iterable[Probe]) -> str:
    """The machine, and a line per engine and processor."""
    isa = ", ".join(machine.isa) or "no known instruction set extensions"
    rows = [("backend", "processor", "usable", "state", "reason")]
    rows += [(p.backend, p.processor, "yes" if p.usable else "no", p.state, p.reason) for p in probes]
    return f"{machine}\n{isa}\n\n{table([[printable(cell) for cell in row] for row in rows])}"


def _graphs(manifest: Manifest) -> str:
    rows = []
    for name, graph in manifest.graphs.items():
        spec, states = graph.spec, _states(graph.spec)
        rows.append((name, graph.scheme, graph.file or "compiled only"))
        for kind, tensors in (("in", spec.inputs), ("out", spec.outputs)):
            rows += [("", kind, str(t)) for t in tensors if t.name not in states]
        if spec.states:
            first = spec.input(spec.states[0].input)
            rows.append(("", "state", f"{len(spec.states)} pairs like {first}"))
    return table([[printable(cell) for cell in row] for row in rows], "  ") if rows else "  none"


def _states(spec: GraphSpec) -> set[str]:
    return {name for pair in spec.states for name in (pair.input, pair.output)}


def _artifacts(manifest: Manifest) -> str:
    rows = []
    for artifact in manifest.artifacts:
        nodes = ", ".join(f"{count} nodes on {where}" for where, count in artifact.placement.items())
        tools = ", ".join(f"{name} {version}" for name, version in artifact.toolchain.items())
        nbytes = size(sum(f.bytes for f in artifact.files))
        rows.append([artifact.graph, str(artifact.target), artifact.scheme, nbytes, nodes, tools, _checked(artifact)])
    return table([[printable(cell) for cell in row] for row in rows], "  ") if rows else ""


def _checked(artifact: Artifact) -> str:
    """What the golden probe said of an artifact when it was made."""
    difference, reason = artifact.parity.get("probe_max_abs"), artifact.parity.get("not_run")
    if difference is not None:
        return f"golden probe within {float(difference):.1e}"
    return f"not run when it was made: {reason}" if reason is not None else "not checked"


def measured(records: Iterable[MeasuredRecord]) -> str:
    """A line for each device that an artifact was timed on."""
    rows: list[Sequence[str]] = [
        ("graph", "for", "measured on", "median", "fastest", "slowest", "runs", "memory", "layers on", "by")
    ]
    for r in records:
        times = (f"{ms:.3g} ms" for ms in (r.latency_ms, *r.spread_ms))
        layers = ", ".join(f"{where} {count}" for where, count in r.placement.items()) or "not told"
        memory = size(r.peak_bytes) if r.peak_bytes else "not told"
        rows.append((r.graph, r.target, r.device, *times, str(r.runs), memory, layers, r.source))
    return table([[printable(cell) for cell in row] for row in rows], "  ")


def parity(records: Iterable[ParityRecord]) -> str:
    """A line for each graph and target that was compared."""
    rows = [("graph", "on", "against", "max abs", "SQNR dB", "cosine", "top-1", "diverges", "pictures", "")]
    for r in records:
        top1 = "-" if r.top1_agreement is None else f"{100 * r.top1_agreement:.2f} %"
        diverges = "never" if r.first_divergent_token is None else f"at token {r.first_divergent_token}"
        if r.top1_agreement is None:
            diverges = "-"  # a graph without tokens
        sqnr = "inf" if math.isinf(r.sqnr_db) else f"{r.sqnr_db:.1f}"
        values = (f"{r.max_abs:.2e}", sqnr, f"{r.cosine:.6f}", top1, diverges, str(r.pictures))
        # what a recipe costs is measured, not judged
        verdict = "cost of the recipe" if r.tolerance.startswith("none") else "passed" if r.passed else "FAILED"
        on = f"{r.target}, {r.where}" if r.where else r.target
        rows.append((r.graph, on, r.against, *values, verdict))
    return table([[printable(cell) for cell in row] for row in rows], "  ") if len(rows) > 1 else ""
