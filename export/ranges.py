"""In which ranges activations lie, for engines that fix them when a graph is compiled.

Once for each graph and backend, whatever chips it is compiled for; the calibration pictures are those of a calibrated
recipe, and the golden probe is among the samples, so that no value of it is out of range.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lensc.backends import registry
from lensc.backends.base import Array, StaticBackend, Target
from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import InputError, UsageError
from lensc.runtime.embedding import open_table
from lensc.runtime.picture import vision_feeds

from .calibration import CalibrationSet, Sample
from .engines import engine_key
from .export_stages import GRAPHS
from .graph import Graph, GraphSpec
from .provenance import code_key
from .stages import Staging
from .verify import probe_feeds

RANGES = "ranges"
"""Folder of the files, in the staging folder."""

SLICES = 32
"""The most slices that are shown, spread evenly over those of the calibration set."""

FEWEST_SLICES = 8
"""A range that fewer have made is not one of pictures."""


FEWEST_TOKENS = 64
"""A shorter context holds no picture."""

PROMPTS, PROMPT_SLICES, PROMPT_TOKENS, PROMPT_ROWS = 24, 32, 512, 128
"""What a decoder is shown: so many prompts with answers, slices in all, tokens of each, and of these so many whose logits
are asked for. Its ranges hardly depend on more:
a token's activations are of the same kind in every text."""


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


def check_context(context: int | None, specs: Mapping[str, GraphSpec], work: Sequence[Work]) -> None:
    """Raise UsageError for a context that no decoder of `work` is compiled for, or that the model has not."""
    if context is None:
        return
    most = specs["decoder"].dims["past"].max
    if not FEWEST_TOKENS <= context <= most:
        raise UsageError(f"--context {context}: expected {FEWEST_TOKENS} to {most}, the model's context")
    if not any("decoder" in job.graphs and isinstance(registry.get(job.target.backend), StaticBackend) for job in work):
        raise UsageError(f"--context {context}: no decoder of this command has fixed shapes (qnn); leave it out")


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
    tables: Mapping[str, str],
    data: Callable[[], CalibrationSet],
) -> dict[str, dict[str, Graph]]:
    """The graphs for each backend of `work`, with their ranges where it needs some. `tables`: files of the staging tree."""
    by_backend = {job.target.backend: dict(graphs) for job in work}
    representative = {job.target.backend: job.target for job in work}
    for name, graph_name in backends_with_ranges({n: g.scheme for n, g in graphs.items()}, work):
        graph, backend = graphs[graph_name], registry.get(name)
        assert isinstance(backend, StaticBackend)
        path = staging.folder / RANGES / f"{graph_name}-{name}.json"
        key = {"graph": graph.sha256, "pictures": data().sha256, **code_key(), **engine_key(representative[name])}
        if graph_name == "decoder":
            key["vision"] = graphs["vision"].sha256
            rows = partial(prompt_rows, backend, graphs["vision"], spec, data, open_table(staging.tree, tables).gather)
            samples = partial(prompt_samples, graph, rows)
        else:
            samples = partial(slice_samples, graph, spec, data)
        make = partial(_measure, backend, graph, samples, data, path)
        staging.stage(f"measure ranges of {graph_name} for {name}", key, str, make)
        by_backend[name][graph_name] = dataclasses.replace(graph, ranges=path)
    return by_backend


def slice_samples(graph: Graph, spec: ModelSpec, data: Callable[[], CalibrationSet]) -> list[dict[str, Array]]:
    """Feeds of one slice each: slices of the pictures, and the golden probe's. Raises InputError if there are too few."""
    slices = [pixels for sample in data().samples for pixels in sample.slices]
    if len(slices) < FEWEST_SLICES:
        raise InputError(
            f"calibration, {data().source}: {data().pictures} pictures of {len(slices)} slices are too few to measure "
            f"ranges; give pictures of at least {FEWEST_SLICES} slices, 20 to 60 pictures are enough"
        )
    count = min(SLICES, len(slices))
    samples = _vision_feeds([slices[i * len(slices) // count] for i in range(count)], spec)
    probe = probe_feeds(graph.spec)
    samples += [{name: a[i : i + 1] for name, a in probe.items()} for i in range(len(probe["patches"]))]
    return samples


def prompt_samples(graph: Graph, rows: Callable[[], list[Array]]) -> list[dict[str, Array]]:
    """Feeds of one sequence each: those of `rows`, float32[tokens, D], and the golden probe's."""
    samples = []
    probe = probe_feeds(graph.spec)
    past = {pair.input for pair in graph.spec.states}
    for whole in rows():
        embeds = whole[: graph.spec.dims["tokens"].max]
        fed: dict[str, Array] = {
            "inputs_embeds": embeds[None],
            "position_ids": np.arange(len(embeds)),
            "logit_positions": np.arange(len(embeds))[:: -(-len(embeds) // PROMPT_ROWS)],
        }
        samples.append(fed | {name: probe[name][:0, :1] for name in past})
    for i in range(len(probe["inputs_embeds"])):
        one = {name: array[:, i : i + 1] if name in past else array for name, array in probe.items()}
        samples.append(one | {"inputs_embeds": probe["inputs_embeds"][i : i + 1]})
    return samples


def prompt_rows(
    backend: StaticBackend,
    vision: Graph,
    spec: ModelSpec,
    data: Callable[[], CalibrationSet],
    gather: Callable[[Array], Array],
) -> list[Array]:
    """What the decoder is fed of some prompts and their answers, float32[tokens, D] each; pictures are seen by `vision` in
    float.
    """
    samples, chosen, slices = data().samples, list[Sample](), 0
    count = min(PROMPTS, len(samples))
    for sample in (samples[i * len(samples) // count] for i in range(count)):
        if slices + len(sample.slices) <= PROMPT_SLICES:
            chosen.append(sample)
            slices += len(sample.slices)
    pixels = [pixels for sample in chosen for pixels in sample.slices]
    encoded: list[Array] = []
    if pixels:
        with tempfile.TemporaryDirectory() as scratch:
            outputs = backend.measure_ranges(vision, _vision_feeds(pixels, spec), Path(scratch) / RANGES)
        encoded = [output["image_embeds"][0] for output in outputs]
    rows = []
    for sample in chosen:
        embeds = np.array(gather(sample.ids), np.float32)
        for start, stop in sample.image_bounds.tolist():
            embeds[start:stop] = encoded.pop(0)
        rows.append(embeds[:PROMPT_TOKENS])
    return rows


def _vision_feeds(slices: Sequence[Array], spec: ModelSpec) -> list[dict[str, Array]]:
    return [dict(vision_feeds([pixels], spec.picture, spec.decoder.hidden_size)[0].feeds) for pixels in slices]


def _measure(
    backend: StaticBackend,
    graph: Graph,
    samples: Callable[[], list[dict[str, Array]]],
    data: Callable[[], CalibrationSet],
    path: Path,
) -> tuple[str, list[Path]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.measure_ranges(graph, samples(), path)
    return str(data()), [path]
