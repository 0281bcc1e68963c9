"""`lensc explain`: where every node of a bundle's artifacts runs, as a table and as a gate for a build pipeline."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensc.backends.base import Artifact, Target
from lensc.backends.bundle import Manifest, load_manifest
from lensc.backends.errors import ExecutionError, UnsupportedError, UsageError

from . import console

CPU = "CPU"
"""How the name of a provider on the CPU begins."""

SUFFIX = ".placement.json"
"""End of the name of an artifact's file that holds where each node is: name to [operator, provider]."""


@dataclass(frozen=True)
class Node:
    """A node of the graph that the engine was given."""

    name: str
    operator: str
    provider: str
    reason: str
    """Why it is not on the target's processor; empty where it is."""


def explain(options: argparse.Namespace) -> int:
    """Print the placement; raise UnsupportedError for more nodes on the CPU than `--max-cpu-nodes`."""
    folder = Path(options.bundle)
    if options.max_cpu_nodes is not None and options.max_cpu_nodes < 0:
        raise UsageError(f"--max-cpu-nodes {options.max_cpu_nodes}: expected 0 or more")
    manifest = load_manifest(folder)
    artifacts = _chosen(manifest, folder, options.target)
    found = [(artifact, nodes(artifact, folder), strayed(artifact)) for artifact in artifacts]
    if options.json:
        console.print_json({"bundle": str(folder), "artifacts": [_as_json(*each) for each in found]})
    else:
        print("\n\n".join(_text(*each) for each in found))
    over = [(a, count) for a, _, count in found if options.max_cpu_nodes is not None and count > options.max_cpu_nodes]
    if over:
        told = ", ".join(f"{a.graph} for {a.target}: {count}" for a, count in over)
        raise UnsupportedError(
            f"{folder}: nodes on the CPU, at most {options.max_cpu_nodes} are allowed: {told}; "
            "compile without --allow-cpu to learn what the processor refuses"
        )
    return 0


def strayed(artifact: Artifact) -> int:
    """How many nodes run on the CPU though the target is another processor."""
    if artifact.target.processor == "cpu":
        return 0
    return sum(count for provider, count in artifact.placement.items() if provider.startswith(CPU))


def nodes(artifact: Artifact, folder: Path) -> tuple[Node, ...]:
    """Every node that the engine has told, in the order of the graph; none where it tells counts only."""
    files = [record.path for record in artifact.files if record.path.endswith(SUFFIX)]
    if not files:
        return ()
    path = folder / files[0]
    try:
        document: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Node(name, operator, provider, _reason(artifact, provider))
            for name, (operator, provider) in document.items()
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExecutionError(f"{path}: no placement of nodes: {error}; build the bundle again") from error


def _reason(artifact: Artifact, provider: str) -> str:
    if artifact.target.processor == "cpu" or not provider.startswith(CPU):
        return ""
    return "the NPU does not take it; allowed by name when it was compiled"


def _chosen(manifest: Manifest, folder: Path, target: str | None) -> list[Artifact]:
    wanted = None if target is None else Target.parse(target)
    artifacts = [a for a in manifest.artifacts if wanted in (None, a.target)]
    if not artifacts:
        built = ", ".join(sorted({str(a.target) for a in manifest.artifacts})) or "nothing: it is a folder of graphs"
        raise UsageError(f"{folder}: no artifact for {target or 'any target'}; it was built for {built}")
    return artifacts


def _as_json(artifact: Artifact, found: tuple[Node, ...], count: int) -> Any:
    return {
        "graph": artifact.graph,
        "target": str(artifact.target),
        "placement": artifact.placement,
        "cpu_nodes": count,
        "nodes": [vars(node) for node in found],
    }


def _text(artifact: Artifact, found: tuple[Node, ...], count: int) -> str:
    counts = ", ".join(f"{n} nodes on {provider}" for provider, n in artifact.placement.items()) or "not told"
    lines = [f"{artifact.graph} for {artifact.target}: {counts}"]
    if artifact.target.processor != "cpu":
        lines[0] += f"; {count} on the CPU"
    elsewhere = [node for node in found if node.reason]
    rows = [(n.name, n.operator, n.provider, n.reason) for n in (*elsewhere, *(n for n in found if not n.reason))]
    if rows:
        lines.append(console.table([[console.printable(cell) for cell in row] for row in rows], "  "))
    else:
        lines.append("  the engine tells counts only")
    return "\n".join(lines)
