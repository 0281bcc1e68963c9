"""In which ranges activations lie, for engines that fix them when a graph is compiled.

Once for each graph and backend, whatever chips it is compiled for; the calibration pictures are those of a calibrated
recipe, and the golden probe is among the samples, so that no value of it is out of range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lensc.backends import registry
from lensc.backends.base import Array, StaticBackend, Target
from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import InputError, UsageError
from lensc.runtime.picture import vision_feeds

from .calibration import CalibrationSet
from .engines import engine_key
from .export_stages import GRAPHS
from .graph import Graph
from .provenance import code_key
from .stages import Staging
from .verify import probe_feeds

RANGES = "ranges"
"""Folder of the files, in the staging folder."""

SLICES = 32
"""The most slices that are shown, spread evenly over those of the calibration set."""

FEWEST_SLICES = 8
"""A range that fewer have made is not one of pictures."""


@dataclass(frozen=True)
class Work:
    """A target, and the graphs to compile for it: those it was named for, or all that its backend compiles."""

    target: Target
    graphs: tuple[str, ...]


def works(targets: Sequence[Target | tuple[str, Target]]) -> tuple[Work, ...]:
    """What is to be compiled. `targets`: one for all graphs, or (graph, target). Raises UsageError for an unknown graph."""
    graphs: dict[Target, list[str]] = {}
    for wanted in targets:
        name, target = wanted if isinstance(wanted, tuple) else (None, wanted)
        backend = registry.get(target.backend)
        able = backend.graphs if isinstance(backend, StaticBackend) else GRAPHS
        if name is not None and name not in GRAPHS:
            raise UsageError(f"target {name}={target}: graph {name!r} is not one of {', '.join(GRAPHS)}")
        graphs.setdefault(target, []).extend(able if name is None else [name])
    return tuple(Work(target, tuple(n for n in GRAPHS if n in names)) for target, names in graphs.items())


def backends_with_ranges(schemes: Mapping[str, str], work: Sequence[Work]) -> list[tuple[str, str]]:
    """(backend, graph) for each that needs ranges, once. `schemes`: of each graph."""
    found: dict[tuple[str, str], None] = {}
    for job in work:
        backend = registry.get(job.target.backend)
        if isinstance(backend, StaticBackend):
            found |= {(job.target.backend, n): None for n in job.graphs if backend.needs_ranges(schemes[n])}
    return list(found)


def with_ranges(
    staging: Staging,
    graphs: Mapping[str, Graph],
    work: Sequence[Work],
    spec: ModelSpec,
    data: Callable[[], CalibrationSet],
) -> dict[str, dict[str, Graph]]:
    """The graphs for each backend of `work`, with their ranges where it needs some."""
    by_backend = {job.target.backend: dict(graphs) for job in work}
    representative = {job.target.backend: job.target for job in work}
    for name, graph_name in backends_with_ranges({n: g.scheme for n, g in graphs.items()}, work):
        graph, backend = graphs[graph_name], registry.get(name)
        assert isinstance(backend, StaticBackend)
        path = staging.folder / RANGES / f"{graph_name}-{name}.json"
        key = {"graph": graph.sha256, "pictures": data().sha256, **code_key(), **engine_key(representative[name])}
        make = partial(_measure, backend, graph, spec, data, path)
        staging.stage(f"measure ranges of {graph_name} for {name}", key, str, make)
        by_backend[name][graph_name] = dataclasses.replace(graph, ranges=path)
    return by_backend


def range_samples(graph: Graph, spec: ModelSpec, data: CalibrationSet) -> list[dict[str, Array]]:
    """Feeds of one slice each: slices of the pictures, and the golden probe's. Raises InputError if there are too few."""
    slices = [pixels for sample in data.samples for pixels in sample.slices]
    if len(slices) < FEWEST_SLICES:
        raise InputError(
            f"calibration, {data.source}: {data.pictures} pictures of {len(slices)} slices are too few to measure ranges; "
            f"give pictures of at least {FEWEST_SLICES} slices, 20 to 60 pictures are enough"
        )
    count = min(SLICES, len(slices))
    chosen = [slices[i * len(slices) // count] for i in range(count)]
    samples = [dict(vision_feeds([pixels], spec.picture, spec.decoder.hidden_size)[0].feeds) for pixels in chosen]
    probe = probe_feeds(graph.spec)
    samples += [{name: a[i : i + 1] for name, a in probe.items()} for i in range(len(probe["patches"]))]
    return samples


def _measure(
    backend: StaticBackend, graph: Graph, spec: ModelSpec, data: Callable[[], CalibrationSet], path: Path
) -> tuple[str, list[Path]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.measure_ranges(graph, range_samples(graph, spec, data()), path)
    return str(data()), [path]
